"""python -m convit_jax.predict and export: names, probabilities, unreadable files, batch sizes."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from conftest import ROOT, run_python
from PIL import Image

from convit_jax.data.class_names import IMAGENET, words
from convit_jax.data.images import centre_crop
from convit_jax.errors import UserError
from convit_jax.export import export
from convit_jax.predict import find_images, read_bytes
from convit_jax.weights import pretrained
from convit_jax.weights.formats import save_converted

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
NAMES = ("n01440764", "n02123045", *"cdefghij")


@pytest.fixture
def weights(tmp_path):
    loaded = pretrained.load(ROOT / "tests/golden/convit_golden.pth")
    save_converted(dataclasses.replace(loaded, class_names=NAMES), tmp_path / "w")
    return tmp_path / "w"


def test_the_names_of_imagenet():
    assert len(IMAGENET) == 1000
    assert list(IMAGENET) == sorted(IMAGENET)
    assert words("n02123045") == "tabby, tabby cat"
    assert words("my class") == "my class"


def test_probabilities_of_readable_images_and_a_report_of_the_others(weights, image_folder):
    bad = image_folder / "train/ant/1.jpg"
    bad.write_bytes(b"")
    arguments = [image_folder / "train/ant", f"{image_folder}/val/*/1.jpg", "missing.jpg", "--batch_size=4"]
    done = run_python("-m", "convit_jax.predict", f"--checkpoint={weights}", "--json", *arguments)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert f"predict: cannot decode the image {bad} (it is empty" in done.stderr
    assert "predict: cannot read the image missing.jpg (No such file" in done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == 5 + 3

    model = pretrained.load(weights).model()
    for answer in answers:
        image = centre_crop(Image.open(answer["image"]), (48, 48), 0.875)
        logits = model(
            (image[None] / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
        )
        expected = np.asarray(jax.nn.softmax(logits)[0])
        found = answer["predictions"]
        assert [each["label"] for each in found] == np.argsort(-expected)[:5].tolist()
        np.testing.assert_allclose(
            [each["probability"] for each in found], np.sort(-expected)[:5] * -1, atol=1e-5
        )
        assert all(each["class"] == NAMES[each["label"]] for each in found)
        assert all(each["words"] == words(each["class"]) for each in found)


def test_the_text_for_people(weights, image_folder):
    done = run_python("-m", "convit_jax.predict", f"--checkpoint={weights}", image_folder / "val/bee/0.jpg")
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert lines[0] == f"{image_folder}/val/bee/0.jpg"
    assert len(lines) == 6
    assert lines[1].split()[1] == "%"


def test_files_folders_and_patterns(image_folder):
    val = image_folder / "val"
    assert len(find_images([str(val)])) == 6
    assert find_images([f"{val}/*/0.jpg", "gone.jpg"]) == [
        *(f"{val}/{name}/0.jpg" for name in ("ant", "bee", "cat")),
        "gone.jpg",
    ]
    (val / "empty").mkdir()
    for nothing in (f"{val}/*.png", f"{val}/empty"):
        assert find_images([nothing]) == [nothing]  # reported when it cannot be read; the others go on
        with pytest.raises(UserError, match=r"there is no image in the folder .*empty|cannot read the image"):
            read_bytes(nothing)


@pytest.mark.parametrize(
    "behaviour", [{"dtype": "float32"}, {"dtype": "bfloat16", "attention": "cudnn", "scan_unroll": 3}]
)
def test_an_exported_network_gives_the_same_logits_at_any_batch_size(behaviour, xla_for_cudnn):
    loaded = pretrained.load(ROOT / "tests/golden/convit_golden.pth")
    loaded = pretrained.with_behaviour(loaded, **behaviour)
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


def test_the_command_writes_one_file(weights, tmp_path):
    arguments = [f"--checkpoint={weights}", "--platforms=cpu", tmp_path / "net.stablehlo"]
    done = run_python("-m", "convit_jax.export", *arguments)
    assert done.stdout.endswith("net.stablehlo: uint8[b,48,48,3] -> float32[b,10], for cpu\n"), done.stderr
    again = run_python("-m", "convit_jax.export", *arguments)
    assert again.returncode == 1
    assert "net.stablehlo exists: give another OUTPUT, or add --overwrite" in again.stderr
