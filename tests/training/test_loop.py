"""What a run learns, logs and leaves behind, and what stops it."""

import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, assert_same, saved

from convit_jax.data import examples
from convit_jax.errors import UserError
from convit_jax.rundir import read_metrics
from convit_jax.training import loop
from convit_jax.training.loop import train


def test_the_training_step_is_compiled_once(digits_config, tmp_path, monkeypatch):
    steps = []
    make = loop.make_train_step

    def counted(*args):
        step = make(*args)

        def traced(*inputs):
            steps.append(None)
            return step(*inputs)

        return traced

    monkeypatch.setattr(loop, "make_train_step", counted)
    train(digits_config, tmp_path)
    assert len(steps) == 1


def test_oblong_images(digits_config, image_folder, tmp_path):
    digits_config.data.name, digits_config.data.dir = "folder", str(image_folder)
    digits_config.batch_size, digits_config.eval_batch_size, digits_config.steps = 6, 4, 2
    digits_config.model.image_size = (12, 18)
    assert train(digits_config, tmp_path / "run")["step"] == 2


def test_processes_and_restarts_are_to_have_images_of_the_same_names(
    digits_config, image_folder, tmp_path, monkeypatch
):
    digits_config.data.name, digits_config.data.dir = "folder", str(image_folder)
    digits_config.batch_size, digits_config.eval_batch_size, digits_config.steps = 6, 4, 2
    compared = []
    monkeypatch.setattr(loop, "check_same", lambda facts, *_: compared.append(facts))
    train(digits_config, tmp_path / "run")
    (image_folder / "train/bee/3.jpg").rename(image_folder / "train/bee/9.jpg")
    with pytest.raises(UserError, match="had images of other names, labels or classes than those now given"):
        train(digits_config, tmp_path / "run")
    first, second = compared[:3], compared[3:]
    assert first[::2] == second[::2]
    assert [name for name in first[1] if first[1][name] != second[1][name]] == [
        "the digest of the images' classes, labels and names"
    ]


def test_a_disk_that_fills_while_logging_is_said_and_the_run_does_not_hang(tmp_path):
    script = f"""
import resource, signal, sys
sys.path[:0] = {[str(ROOT), str(ROOT / "tests")]!r}
import conftest
from pathlib import Path
from convit_jax.errors import UserError
from convit_jax.training.metrics import MetricsLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log = MetricsLog(Path({str(tmp_path)!r}), 0, {{}})
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    for step in range(5000):
        log.write(step, 0.0, dict(train_loss=1.0, lr=0.1))
except UserError as error:
    log.close()
    print("said:", error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert "said: cannot write" in done.stdout, done.stdout + done.stderr
    assert "make room" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(digits_config, tmp_path):
    digits_config.checkpoint_every = 2
    digits_config.steps = 4
    train(digits_config, tmp_path)
    good = saved(tmp_path)
    config_file = tmp_path / "config.json"
    config_file.write_text(config_file.read_text().replace('"lr": 0.008', '"lr": 1e+30'))
    digits_config.optim.lr, digits_config.steps = 1e30, 12
    with pytest.raises(UserError, match=r"stopped being finite at step 6; step 4 is saved") as error:
        train(digits_config, tmp_path)
    assert "lower optim.lr" in str(error.value)
    assert_same(good, saved(tmp_path))


@pytest.mark.parametrize("eval_batch_size", [360, 77, 1000])
def test_evaluation_is_exact_at_any_batch_size(digits_config, trained, eval_batch_size):
    from flax import nnx

    from convit_jax.data.augment import normalize
    from convit_jax.data.sources import Digits
    from convit_jax.models.variants import abstract_model, model_settings
    from convit_jax.training.plan import model_arguments

    log = trained / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(True)[:-1]))  # without the evaluation, which is due
    digits_config.eval_batch_size = eval_batch_size
    result = train(digits_config, trained)
    graphdef, _ = abstract_model(model_settings(**model_arguments(digits_config, 10)))
    model = nnx.merge(graphdef, saved(trained)["state"]["params"])
    digits = Digits("test")
    logits = np.asarray(model(normalize(digits.images, digits_config.data.mean, digits_config.data.std)))
    order = np.argsort(-logits, axis=1)
    label_logit = logits[np.arange(360), digits.labels]
    assert result["val_top1"] == 100 * np.sum(order[:, 0] == digits.labels) / 360
    assert result["val_top5"] == 100 * np.sum(order[:, :5] == digits.labels[:, None]) / 360
    loss = np.mean(np.log(np.exp(logits).sum(1)) - label_logit)
    np.testing.assert_allclose(result["val_loss"], loss, rtol=1e-5)


def test_what_a_run_leaves_behind(digits_config, tmp_path, capsys, monkeypatch):
    monkeypatch.undo()  # draws curves
    result = train(digits_config, tmp_path)
    printed = capsys.readouterr().out
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["steps"] == 12
    assert run["images"] == 960
    assert run["flops"] == 2 * run["macs"] > 0
    assert f"{run['parameters']:,} parameters" in printed
    assert "0.00125 at its peak" in printed
    assert "optim.weight_decay=0.05" in printed
    assert json.loads((tmp_path / "config.json").read_text())["batch_size"] == 80
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "tensorboard").glob("events*"))
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 4, 8, 12, 12]
    looks = {"gates", "centre_x", "centre_y", "span", "nonlocality"}
    assert set(lines[0]) == {"step", "epoch", *looks}
    assert set(lines[1]) == {
        "step",
        "epoch",
        "train_loss",
        "train_top1",
        "lr",
        "images_per_second",
        "data_wait",
    }
    assert set(lines[-1]) == {"step", "epoch", "val_top1", "val_top5", "val_loss", *looks}
    assert lines[-1] == result
    for name in ("checkpoints", "curves", "TensorBoard", "next"):
        assert f"  {name} " in printed


def test_a_finished_run_started_again_says_what_came_out(digits_config, trained, capsys):
    first = read_metrics(trained / "metrics.jsonl")[-1]
    capsys.readouterr()
    assert train(digits_config, trained) == first
    assert f"Done: top-1 {first['val_top1']:.2f}" in capsys.readouterr().out


def test_the_moving_average_is_evaluated_beside_the_weights(digits_config, tmp_path):
    digits_config.optim.ema_decay = 0.9
    last = train(digits_config, tmp_path)
    assert {"val_top1", "val_ema_top1", "val_ema_loss"} <= set(last)
    assert last["val_loss"] != last["val_ema_loss"]


def test_it_learns_an_image_folder(digits_config, image_folder, tmp_path):
    digits_config.data.name, digits_config.data.dir = "folder", str(image_folder)
    digits_config.augment.crop = "resized"
    digits_config.model.image_size = 16
    digits_config.batch_size, digits_config.eval_batch_size = 6, 4
    digits_config.optim.lr = 0.3
    digits_config.epochs, digits_config.steps = 20, None
    assert train(digits_config, tmp_path / "run")["val_top1"] > 99


def test_unreadable_images_are_named_and_counted_and_the_run_goes_on(
    digits_config, image_folder, tmp_path, capsys
):
    digits_config.data.name, digits_config.data.dir = "folder", str(image_folder)
    digits_config.batch_size, digits_config.eval_batch_size = 6, 4
    (image_folder / "train/bee/3.jpg").write_bytes(b"not an image")
    (image_folder / "val/cat/1.jpg").write_bytes(b"")
    last = train(digits_config, tmp_path / "run")
    said = capsys.readouterr().out
    assert said.count("cannot decode the image bee/3.jpg (unknown image format)") == 1
    assert said.count("cannot decode the image cat/1.jpg (it is empty, 0 bytes)") == 1
    assert last["step"] == 6
    assert last["val_top1"] in [pytest.approx(100 * hits / 5) for hits in range(6)]  # of 6 images
    assert read_metrics(tmp_path / "run/metrics.jsonl")[-2]["unreadable_images"] == 1


def test_too_many_unreadable_images_stop_the_run_and_what_was_saved_stays(
    digits_config, image_folder, tmp_path
):
    digits_config.data.name, digits_config.data.dir = "folder", str(image_folder)
    digits_config.batch_size, digits_config.eval_batch_size = 6, 4
    digits_config.checkpoint_every, digits_config.steps = 1, 4
    train(digits_config, tmp_path / "run")
    digits_config.steps, digits_config.data.max_unreadable = 12, 0
    (image_folder / "train/bee/3.jpg").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"bee/3\.jpg .* than data\.max_unreadable=0 allows"):
        train(digits_config, tmp_path / "run")
    assert saved(tmp_path / "run")["state"]["step"] >= 4


def test_the_loader_of_a_run_draws_only_the_images_of_its_subset(digits_config, tmp_path, monkeypatch):
    digits_config.data.sampling_ratio, digits_config.data.num_classes = 0.1, 4
    digits_config.batch_size, digits_config.eval_batch_size = 8, 16
    seen, decode = set(), examples.decode

    def spy(record, name):
        seen.add(name)
        return decode(record, name)

    monkeypatch.setattr(examples, "decode", spy)
    train(digits_config, tmp_path)
    assert {name.split("/")[0] for name in seen} == {"0", "1", "2", "3"}
    assert json.loads((tmp_path / "run.json").read_text())["train_images"] == sum(
        int(count * 0.1) for count in np.bincount(loader_labels())[:4]
    )


def loader_labels():
    """Labels of all training digits."""
    from convit_jax.data.sources import Digits

    return Digits("train").labels
