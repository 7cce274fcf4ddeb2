"""python -m convit_jax.evaluate: the numbers of the training, labels matched, unreadable images."""

import csv
import dataclasses
import json
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import ROOT
from flax import nnx
from scipy.special import log_softmax

from convit_jax.analysis.interventions import force_gates, mask_position_embedding
from convit_jax.data.sources import open_source
from convit_jax.errors import UserError
from convit_jax.rundir import read_metrics
from convit_jax.training.evaluation import evaluate
from convit_jax.training.sharding import make_mesh
from convit_jax.weights import pretrained
from convit_jax.weights.formats import save_converted
from convit_jax.weights.pretrained import match_classes


@pytest.fixture
def lines(run_here):
    """A function: what evaluate prints."""
    return lambda *arguments: run_here("evaluate", *arguments).stdout.splitlines()


def test_a_run_and_its_converted_weights_give_the_numbers_of_the_training(trained, lines, tmp_path):
    result = read_metrics(trained / "metrics.jsonl")[-1]
    expected = "top-1 {val_top1:.3f}  top-5 {val_top5:.3f}  loss {val_loss:.3f}  images 360".format(**result)
    # Also where the training had other devices, its data lay elsewhere, and a field was not there yet.
    file = tmp_path / "run/config.json"
    saved = json.loads(file.read_text())
    saved["mesh"] = {"data": 1, "fsdp": 8}
    saved["data"].update(name="folder", dir="gone")
    del saved["data"]["max_unreadable"]
    file.write_text(json.dumps(saved))
    changed = ["--config.data.name=digits", "--config.data.dir=", "--config.eval_batch_size=50"]
    assert lines(f"--checkpoint={tmp_path}/run", *changed)[-1] == expected
    save_converted(pretrained.load(tmp_path / "run"), tmp_path / "w")
    config = ["--config=configs/digits.py", "--config.eval_batch_size=77"]
    assert lines(f"--checkpoint={tmp_path}/w", *config)[-1] == expected


def test_what_is_changed_for_an_evaluation_is_said(digits_config, trained, lines, tmp_path):
    digits = open_source(digits_config.data, "test")
    normalised = (digits.images / np.float32(255) - np.float32(0.305)) / np.float32(0.376)
    loaded = pretrained.load(trained)
    head, mean = loaded.params()["head"], loaded.model()(normalised).mean(0)
    sharp = {"head.weight": 100 * head["kernel"].T, "head.bias": 100 * (head["bias"] - mean)}  # tells images apart
    loaded = dataclasses.replace(loaded, tensors={**loaded.tensors, **jax.device_get(sharp)})
    save_converted(loaded, tmp_path / "w")
    changes = ["--mask=position_embedding", "--gates=content", "--gpsa_layers=1", "--config.eval_batch_size=50"]
    *shown, last = lines(f"--checkpoint={tmp_path}/w", "--config=configs/digits.py", *changes)
    assert (
        "Changed for this evaluation: position embedding set to 0; gates of the first 1 of 2 GPSA layers "
        "set to content only (sigma = 0)" in shown
    )
    params = force_gates(mask_position_embedding(loaded.params()), "content", 1)
    logits = nnx.merge(loaded.network[0], params)(normalised)
    order, log_p = np.argsort(-logits, axis=1), log_softmax(logits, axis=1)
    top1, top5 = (100 * np.mean((order[:, :k] == digits.labels[:, None]).any(1)) for k in (1, 5))
    loss = -log_p[np.arange(360), digits.labels].mean()
    np.testing.assert_allclose([float(number) for number in last.split()[1::2]], [top1, top5, loss, 360], atol=1e-3)


def test_images_in_folders(image_folder, lines, tmp_path):
    loaded = pretrained.load(ROOT / "tests/golden/convit_golden.pth", num_classes=3)
    save_converted(loaded, tmp_path / "w")
    (image_folder / "val/bee/0.jpg").write_bytes(b"not an image")
    data = [f"--config.data.{field}" for field in ("name=folder", f"dir={image_folder}", "workers=0")]
    files = [f"--predictions={tmp_path}/new/p.csv", f"--confusion={tmp_path}/c.png"]
    what = ["--per_class", *files, "--config.eval_batch_size=4"]
    shown = lines(f"--checkpoint={tmp_path}/w", "--config=configs/convit_ti.py", *data, *what)
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    assert "bee/0.jpg" in "".join(shown)  # left out, and said
    assert re.fullmatch(r"top-1 \d+\.000  top-5 100\.000  loss \d\.\d{3}  images 5", shown[-1])
    head, *rows = csv.reader((tmp_path / "new/p.csv").read_text().splitlines())
    assert head == ["image", "label", "prediction", "probability"]
    kept = [(name, f"class {label}") for label, name in enumerate(("ant", "bee", "cat"))]
    images = [[f"{name}/{number}.jpg", label] for name, label in kept for number in range(2)]
    assert [row[:2] for row in rows] == [image for image in images if image[0] != "bee/0.jpg"]
    right = {label: [row[2] == label for row in rows if row[1] == label] for _, label in kept}
    table = [f"{len(hits):6}  {100 * np.mean(hits):6.2f}  {label}" for label, hits in right.items()]
    assert shown[-5:-1] == ["images   top-1  class", *table]
    top1 = 100 * np.mean([row[1] == row[2] for row in rows])
    assert shown[-1].startswith(f"top-1 {top1:.3f} ")
    assert all(1 / 3 <= float(row[3]) <= 1 for row in rows)


@pytest.mark.parametrize("flag", ["--predictions=DIR", "--predictions=DIR/file/p.csv", "--confusion=DIR/file/c.png"])
def test_files_that_cannot_be_written_are_refused_before_the_work(flag, run_here, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=rf"cannot write {tmp_path}\S* \(.*\): check the path"):
        run_here("evaluate", "--checkpoint=gone", flag.replace("DIR", str(tmp_path)))


def test_what_cannot_be_evaluated_is_refused(trained, image_folder, run_here, tmp_path):
    with pytest.raises(UserError, match="eval_batch_size is 0"):
        run_here("evaluate", f"--checkpoint={trained}", "--config.eval_batch_size=0")
    for image in (image_folder / "val/ant").iterdir():
        image.unlink()
    first = ["--config=configs/finetune.py", f"--config.data.dir={image_folder}", "--config.data.num_classes=1"]
    save_converted(pretrained.load(trained, num_classes=1), tmp_path / "w")
    with pytest.raises(UserError, match="none of the 1 classes has a test image"):
        run_here("evaluate", f"--checkpoint={tmp_path}/w", *first)


def test_a_split_of_which_no_image_can_be_read_is_refused():
    with pytest.raises(UserError, match="none of the test images can be read"):
        evaluate({"": None}, [], None, make_mesh(1, 1))


def test_labels_are_matched_by_name_where_names_are_known():
    def matched(names):
        labels, remark = match_classes(names, weights)
        return labels.tolist(), remark

    weights = SimpleNamespace(settings={"num_classes": 4}, class_names=("a", "b", "c", "d"))
    assert matched(("b", "d")) == ([1, 3], None)
    remark = "The data's classes ('w', ...) are not the weights' ('a', ...): matched in order."
    assert matched(("w", "x", "y", "z")) == ([0, 1, 2, 3], remark)
    for names in (("x", "y"), ("v", "w", "x", "y", "z")):
        with pytest.raises(UserError, match=f"the data has {len(names)} classes, as '{names[0]}', and"):
            match_classes(names, weights)
    weights.class_names = None
    assert matched(("x", "y")) == ([0, 1], None)
