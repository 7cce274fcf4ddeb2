"""python -m convit_jax.convert as a user runs it."""

import dataclasses
import errno
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, assert_same, run_python, says

from convit_jax.convert import check_target
from convit_jax.errors import UserError
from convit_jax.models.variants import abstract_model, model_settings
from convit_jax.weights import pretrained
from convit_jax.weights.formats import save
from convit_jax.weights.names import shapes
from convit_jax.weights.writer import write

GOLDEN = ROOT / "tests/golden"


def test_a_training_checkpoint_becomes_a_directory_and_goes_back(tmp_path):
    done = run_python("-m", "convit_jax.convert", GOLDEN / "convit_golden_training.pth", tmp_path / "weights")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ConViT: 58,246 parameters (float32), 4 blocks, 3 of them GPSA, 4 heads,")
    assert done.stderr == ""
    for target in ("back.pth", "back.safetensors"):
        done = run_python("-m", "convit_jax.convert", tmp_path / "weights", tmp_path / target)
        assert done.returncode == 0, done.stderr
        back = pretrained.load(tmp_path / target).tensors
        assert_same(back, pretrained.load(GOLDEN / "convit_golden.safetensors").tensors)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back.pth", "back.safetensors", "weights"]


def test_a_file_that_does_not_tell_the_heads_is_said(tmp_path):
    settings = model_settings("deit_tiny", num_classes=3, image_size=16, depth=1)  # of 3 heads by its width
    tensors = {
        name: np.zeros(shape, np.float32) for name, shape in shapes(abstract_model(settings)[1]).items()
    }
    write(tmp_path / "it.pth", tensors)
    done = run_python(
        "-m", "convit_jax.convert", tmp_path / "it.pth", tmp_path / "x.safetensors", "--heads=4"
    )
    assert done.stdout.endswith(
        "does not tell that it has 4 heads: say so to what reads it, here with --heads=4.\n"
    )


def test_a_new_head_and_larger_images(tmp_path):
    arguments = [GOLDEN / "convit_golden.pth", tmp_path / "weights", "--num_classes=3", "--image_size=48x64"]
    done = run_python("-m", "convit_jax.convert", *arguments)
    assert "48 x 64 px in patches of 8, 3 classes\nnew head for 3 classes\nposition emb" in done.stdout
    assert pretrained.load(tmp_path / "weights").settings["image_size"] == (48, 64)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["only.pth"], "give SOURCE and TARGET, not 1 arguments"),
        (["missing.pth", "new"], "there is no file or directory missing.pth"),
        ([GOLDEN / "README.md", "new"], f"cannot read {GOLDEN}/README.md: "),
        (
            ["convit_tiny", "new.pth", "--dtype=bfloat16"],
            "--dtype is what a converted directory is run in; new.pth",
        ),
        (["convit_tiny", "new", "--image_size=large"], "--image_size is 'large': give 384, or HEIGHTxWIDTH"),
        (["convit_tiny", GOLDEN / "convit_golden.pth"], f"{GOLDEN}/convit_golden.pth exists: give another"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, sentence):
    assert says("-m", "convit_jax.convert", *arguments).startswith(f"convert: {sentence}")


def test_only_converted_weights_are_replaced(tmp_path):
    check_target(tmp_path / "new", overwrite=False)
    with pytest.raises(UserError, match=r"new.bin ends in .bin: give a directory, a .pth or a .safetensors"):
        check_target(tmp_path / "new.bin", overwrite=False)
    (tmp_path / "weights.safetensors").touch()
    with pytest.raises(UserError, match="exists: give another TARGET, or add --overwrite"):
        check_target(tmp_path, overwrite=False)
    check_target(tmp_path, overwrite=True)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="holds other things than converted weights"):
        check_target(tmp_path, overwrite=True)


def test_a_directory_is_replaced_whole(tmp_path):
    loaded = pretrained.load(GOLDEN / "convit_golden.pth")
    save(loaded, tmp_path / "w")
    save(pretrained.load(GOLDEN / "convit_golden.pth", num_classes=2), tmp_path / "w")
    assert pretrained.load(tmp_path / "w").settings["num_classes"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["w"]


def test_a_directory_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    loaded = pretrained.load(GOLDEN / "convit_golden.pth")
    save(loaded, tmp_path / "w")

    def replace(source, target, replace=os.replace):
        if source.name == "whole":
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="No space left"):
        save(dataclasses.replace(loaded, class_names=tuple("abcdefghij")), tmp_path / "w")
    assert pretrained.load(tmp_path / "w").class_names is None
    assert [path.name for path in tmp_path.iterdir()] == ["w"]


def test_importing_the_package_stays_light():
    script = (
        "import sys, convit_jax; print([m for m in ('orbax', 'huggingface_hub', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n", done.stderr
