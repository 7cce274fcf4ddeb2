"""python -m convit_jax.convert as a user runs it."""

import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, assert_same, run_python, says

from convit_jax.convert import check_target
from convit_jax.errors import UserError
from convit_jax.models.variants import abstract_model, model_settings
from convit_jax.weights import pretrained
from convit_jax.weights.formats import write_safetensors
from convit_jax.weights.names import state_dict_shapes

GOLDEN = ROOT / "tests/golden"


def test_a_training_checkpoint_becomes_a_directory_and_goes_back(tmp_path):
    done = run_python("-m", "convit_jax.convert", GOLDEN / "convit_golden_training.pth", tmp_path / "weights")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ConViT: 58,246 parameters (float32), 4 blocks, 3 of them GPSA, 4 heads,")
    assert done.stderr == ""
    done = run_python("-m", "convit_jax.convert", tmp_path / "weights", tmp_path / "back.safetensors")
    assert done.returncode == 0, done.stderr
    back = pretrained.load(tmp_path / "back.safetensors").tensors
    assert_same(back, pretrained.load(GOLDEN / "convit_golden.pth").tensors)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back.safetensors", "weights"]


def test_a_new_head_larger_images_and_heads_that_a_file_cannot_tell(tmp_path):
    settings = model_settings("deit_tiny", num_classes=3, image_size=16, depth=1)  # the table says 3 heads
    shapes = state_dict_shapes(abstract_model(settings)[1])
    write_safetensors(tmp_path / "it.safetensors", {name: np.zeros(shape, "f4") for name, shape in shapes.items()})
    arguments = [
        tmp_path / "it.safetensors",
        tmp_path / "new.safetensors",
        "--num_classes=5",
        "--image_size=16x32",
    ]
    done = run_python("-m", "convit_jax.convert", *arguments, "--heads=4")
    assert "16 x 32 px in patches of 16, 5 classes\nnew head for 5 classes\nposition emb" in done.stdout
    assert done.stdout.endswith("cannot tell that the model has 4 heads: load it with --heads=4.\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([GOLDEN / "README.md", "new"], f"cannot read {GOLDEN}/README.md: "),
        (
            ["convit_tiny", "mine.pth"],
            "convert writes no .pth: give mine.safetensors, which PyTorch and timm",
        ),
    ],
)
def test_a_mistake_is_one_message(arguments, message):
    assert says("-m", "convit_jax.convert", *arguments).startswith(f"convert: {message}")


def test_only_converted_weights_are_replaced(tmp_path):
    check_target(tmp_path / "new", overwrite=False)
    with pytest.raises(UserError, match=r"new.bin ends in .bin: give a directory or a .safetensors"):
        check_target(tmp_path / "new.bin", overwrite=False)
    with pytest.raises(UserError, match=r"writes no .pt: give .*new.safetensors"):
        check_target(tmp_path / "new.pt", overwrite=True)
    (tmp_path / "weights.safetensors").touch()
    with pytest.raises(UserError, match="exists: give another TARGET, or add --overwrite"):
        check_target(tmp_path, overwrite=False)
    check_target(tmp_path, overwrite=True)
    (tmp_path / "thesis.tex").touch()
    for target, sentence in ((tmp_path, "holds other things"), (tmp_path / "thesis.tex", "is a file")):
        with pytest.raises(UserError, match=sentence):
            check_target(target, overwrite=True)


def test_importing_the_package_stays_light():
    script = "import sys, convit_jax; print([m for m in ('orbax', 'huggingface_hub', 'PIL') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n", done.stderr
