"""python -m convit_jax.predict and export: names, probabilities, unreadable files, batch sizes."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from conftest import run_python

from convit_jax import predict
from convit_jax.data.class_names import IMAGENET, words
from convit_jax.data.images import centre_crop, open_image
from convit_jax.errors import UserError
from convit_jax.export import export
from convit_jax.weights import pretrained
from convit_jax.weights.formats import save_converted

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
NAMES = ("n01440764", "n02123045", *"cdefghij")


@pytest.fixture
def weights(golden, tmp_path):
    save_converted(dataclasses.replace(golden, class_names=NAMES), tmp_path / "w")
    return tmp_path / "w"


def test_probabilities_of_readable_images_and_a_report_of_the_others(weights, image_folder, run_here):
    bad = image_folder / "train/ant/1.jpg"
    bad.write_bytes(b"")
    arguments = [image_folder / "train/ant", f"{image_folder}/val/*/1.jpg", "missing.jpg", "--batch_size=4"]
    done = run_here("predict", f"--checkpoint={weights}", "--json", *arguments)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert f"predict: cannot decode the image {bad} (unknown image format" in done.stderr
    assert "predict: cannot read missing.jpg (No such file" in done.stderr
    assert len(IMAGENET) == 1000
    assert words("n02123045") == "tabby, tabby cat"
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == 5 + 3

    images = np.stack([centre_crop(open_image(each["image"]), (48, 48), 0.875) for each in answers])
    expected = np.asarray(jax.nn.softmax(pretrained.load(weights).model()((images / 255 - MEAN) / STD)))
    for answer, probabilities in zip(answers, expected, strict=True):
        found = answer["predictions"]
        best = np.argsort(-probabilities)[:5]
        assert [each["label"] for each in found] == best.tolist()
        np.testing.assert_allclose([each["probability"] for each in found], probabilities[best], atol=1e-5)
        assert all(each["class"] == NAMES[each["label"]] for each in found)
        assert all(each["words"] == words(each["class"]) for each in found)


def test_text_for_people(weights, image_folder):
    image = image_folder / "val/ant/0.jpg"
    done = run_python("-m", "convit_jax.predict", f"--checkpoint={weights}", image)
    assert (done.returncode, done.stderr) == (0, "")
    path, *lines = done.stdout.splitlines()
    assert path == str(image)
    shown = [re.fullmatch(r"  ( \d\d|  \d)\.\d %  (.+)", line)[2] for line in lines]
    assert len(set(shown)) == 5
    assert set(shown) <= set(map(words, NAMES))


def test_files_folders_and_patterns(image_folder):
    val = image_folder / "val"
    assert len(predict.find_images([str(val)])) == 6
    first = [f"{val}/{name}/0.jpg" for name in ("ant", "bee", "cat")]
    assert predict.find_images([f"{val}/*/0.jpg", "gone.jpg"]) == [*first, "gone.jpg"]
    (val / "empty").mkdir()
    for nothing in (f"{val}/*.png", f"{val}/empty"):
        assert predict.find_images([nothing]) == [nothing]  # reported when it is read; the others go on


@pytest.mark.parametrize(
    "behaviour", [{"dtype": "float32"}, {"dtype": "bfloat16", "attention": "cudnn", "scan_unroll": 3}]
)
def test_an_exported_network_gives_the_same_logits_at_any_batch_size(behaviour, golden, xla_for_cudnn):
    loaded = pretrained.with_behaviour(golden, **behaviour)
    exported = jax.export.deserialize(export(loaded, ["cpu", "cuda"]).serialize())
    assert exported.platforms == ("cpu", "cuda")
    model, how = loaded.model(), loaded.preprocessing
    for batch in (1, 3):
        images = np.random.default_rng(batch).integers(0, 256, (batch, 48, 48, 3), np.uint8)
        normalised = (images / np.float32(255) - np.float32(how.mean)) / np.float32(how.std)
        logits = exported.call(images)
        assert logits.dtype == np.float32
        atol = 1e-5 if behaviour["dtype"] == "float32" else 0.05
        np.testing.assert_allclose(logits, model(normalised), atol=atol)


def test_the_command_writes_one_file(weights, tmp_path, run_here):
    arguments = [f"--checkpoint={weights}", "--platforms=cpu", tmp_path / "net.stablehlo"]
    done = run_python("-m", "convit_jax.export", *arguments)
    assert done.stdout.endswith("net.stablehlo: uint8[b,48,48,3] -> float32[b,10], for cpu\n"), done.stderr
    with pytest.raises(UserError, match=r"net.stablehlo exists: give another OUTPUT, or add --overwrite"):
        run_here("export", *arguments)
