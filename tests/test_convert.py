"""python -m convit_jax.convert as a user runs it."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import safetensors
from conftest import GOLDEN, assert_same, run_python

from convit_jax.errors import UserError
from convit_jax.models.variants import abstract_model, model_settings
from convit_jax.weights import pretrained
from convit_jax.weights.formats import write_safetensors
from convit_jax.weights.names import state_dict_shapes


def test_a_training_checkpoint_becomes_a_directory_and_goes_back(golden, tmp_path, run_here):
    done = run_python("-m", "convit_jax.convert", GOLDEN / "convit_golden_training.pth", tmp_path / "weights")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ConViT: 58,246 parameters (float32), 4 blocks, 3 of them GPSA, 4 heads,")
    assert done.stderr == ""
    run_here("convert", tmp_path / "weights", tmp_path / "back.safetensors")
    assert_same(pretrained.load(tmp_path / "back.safetensors").tensors, golden.tensors)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back.safetensors", "weights"]


def test_a_new_head_and_larger_images_and_a_file_that_knows_what_shapes_do_not_tell(tmp_path, run_here):
    settings = model_settings("deit_tiny", num_classes=3, image_size=16, depth=1)  # the table says 3 heads
    shapes = state_dict_shapes(abstract_model(settings)[1])
    write_safetensors(tmp_path / "it.safetensors", {name: np.zeros(shape, "f4") for name, shape in shapes.items()})
    files = [tmp_path / "it.safetensors", tmp_path / "new.safetensors"]
    done = run_here("convert", *files, "--num_classes=5", "--image_size=16x64", "--heads=4", "--dtype=bfloat16")
    assert "16 x 64 px in patches of 16, 5 classes\nnew head for 5 classes\nposition emb" in done.stdout
    assert "std 0.229, 0.224, 0.225; without names of classes\nWritten to" in done.stdout
    kept = pretrained.load(tmp_path / "new.safetensors").settings
    assert (kept["num_heads"], kept["image_size"], kept["dtype"]) == (4, (16, 64), "bfloat16")  # 4 patches, no square
    run_here("convert", tmp_path / "new.safetensors", tmp_path / "timm", "--for=timm")
    assert pretrained.load(tmp_path / "timm").settings == {**kept, "dtype": "float32"}
    written = json.loads((tmp_path / "timm/config.json").read_text())
    (tmp_path / "timm/config.json").write_text(json.dumps({**written, "label_names": {"0": "cat", "2": "dog"}}))
    assert pretrained.load(tmp_path / "timm").class_names == ("cat", "class 1", "dog", "class 3", "class 4")
    (tmp_path / "timm/config.json").write_text(json.dumps({**written, "global_pool": "avg"}))
    with pytest.raises(UserError, match="global_pool is 'avg', but heads here read the class token"):
        pretrained.load(tmp_path / "timm")


def test_a_run_keeps_its_preprocessing_and_classes_in_a_file(trained, tmp_path, run_here):
    run_here("convert", trained, tmp_path / "digits.safetensors")
    run, file = pretrained.load(trained), pretrained.load(tmp_path / "digits.safetensors")
    assert dataclasses.replace(file, tensors={}, source="") == dataclasses.replace(run, tensors={}, source="")
    assert file.preprocessing.mean == (0.305, 0.305, 0.305)
    shutil.copy(tmp_path / "digits.safetensors", tmp_path / "renamed.bin")
    assert pretrained.load(tmp_path / "renamed.bin").class_names == run.class_names
    shutil.copy(GOLDEN / "convit_golden.pth", tmp_path / "misnamed.safetensors")
    assert pretrained.load(tmp_path / "misnamed.safetensors").preprocessing.mean == (0.485, 0.456, 0.406)
    with safetensors.safe_open(tmp_path / "digits.safetensors", "np") as header:
        assert header.metadata()["format"] == "pt"  # which timm and transformers look for


def test_a_directory_for_timm_names_the_model_its_sizes_and_its_preprocessing(golden, tmp_path, run_here):
    run_here("convert", GOLDEN / "convit_golden.pth", tmp_path / "timm", "--for=timm")
    config = json.loads((tmp_path / "timm/config.json").read_text())
    sizes = {"img_size": [48, 48], "patch_size": 8, "embed_dim": 8, "depth": 4, "num_heads": 4, "mlp_ratio": 4.0}
    assert (config["architecture"], config["num_classes"], config["num_features"]) == ("convit_tiny", 10, 32)
    assert config["model_args"] == {**sizes, "in_chans": 3, "qkv_bias": False, "local_up_to_layer": 3}
    assert config["pretrained_cfg"]["input_size"] == [3, 48, 48]
    assert "A ConViT with 4 blocks (3 of them GPSA)" in (tmp_path / "timm/README.md").read_text()
    run_here("convert", GOLDEN / "convit_golden.pth", tmp_path / "timm", "--overwrite", "--num_classes=3")
    assert {path.name for path in (tmp_path / "timm").iterdir()} == {"weights.safetensors", "config.json"}
    run_here("convert", GOLDEN / "convit_golden.pth", tmp_path / "timm", "--overwrite", "--for=timm")
    assert_same({**pretrained.load(tmp_path / "timm").tensors}, {**golden.tensors})
    with pytest.raises(UserError, match=r"--for=timm writes a directory: name it .*/a\."):
        run_here("convert", GOLDEN / "convit_golden.pth", tmp_path / "a.safetensors", "--for=timm")


def test_only_converted_weights_are_replaced(tmp_path, run_here):
    with pytest.raises(UserError, match=r"cannot read .*/README.md: it is neither"):
        run_here("convert", GOLDEN / "README.md", tmp_path / "new")
    for suffix in (".bin", ".pth"):
        with pytest.raises(UserError, match=r"not written: give a directory or .*new.safetensors"):
            run_here("convert", GOLDEN / "convit_golden.pth", tmp_path / f"new{suffix}")
    target = tmp_path / "mine"
    target.mkdir()  # an empty directory
    run_here("convert", GOLDEN / "convit_golden.pth", target)
    with pytest.raises(UserError, match="exists: give another TARGET, or add --overwrite"):
        run_here("convert", GOLDEN / "convit_golden.pth", target)
    run_here("convert", GOLDEN / "convit_golden.pth", target, "--overwrite")
    (tmp_path / "project").mkdir()
    (tmp_path / "project/README.md").touch()
    (target / "thesis.tex").touch()
    for other in (target, target / "thesis.tex", tmp_path / "project"):
        with pytest.raises(UserError, match="holds other things"):
            run_here("convert", GOLDEN / "convit_golden.pth", other, "--overwrite")


def test_importing_the_package_stays_light():
    script = "import sys, convit_jax; print([m for m in ('orbax', 'huggingface_hub', 'PIL') if m in sys.modules])"
    done = run_python("-c", script)
    assert done.stdout == "[]\n", done.stderr
