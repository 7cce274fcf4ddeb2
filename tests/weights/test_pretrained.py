"""Weights from every kind of source, and starting a training from them."""

import dataclasses
import json
import os
from pathlib import Path

import huggingface_hub.constants
import jax
import ml_dtypes
import numpy as np
import pytest
from conftest import GOLDEN, assert_same, saved
from flax import nnx
from forgery import save_torch
from orbax.checkpoint import v1 as ocp

import convit_jax
from convit_jax.data.class_names import IMAGENET
from convit_jax.errors import UserError
from convit_jax.training import setup
from convit_jax.training.loop import train
from convit_jax.weights import pretrained
from convit_jax.weights.checkpoint_file import read_state_dict
from convit_jax.weights.formats import save_converted, write_safetensors
from convit_jax.weights.preprocess import Preprocessing

WEIGHTS = GOLDEN / "convit_golden.safetensors"


@pytest.fixture
def golden_config(digits_config):
    """A training of digits with the architecture of the golden file, enlarged to its 48 pixels."""
    config = digits_config
    config.model.image_size, config.model.patch_size, config.model.embed_dim = 48, 8, 32
    config.model.depth, config.model.local_up_to_layer = 4, 3
    config.batch_size, config.steps, config.checkpoint_every = 16, 1, 1
    return config


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn])
def test_a_converted_directory_gives_the_same_tensors_and_preprocessing(golden, tmp_path, dtype):
    tensors = {name: tensor.astype(dtype) for name, tensor in golden.tensors.items()}
    how = Preprocessing(0.9, "bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    changed = dataclasses.replace(golden, tensors=tensors, preprocessing=how, class_names=tuple("abcdefghij"))
    save_converted(changed, tmp_path / "w")
    loaded = pretrained.load(tmp_path / "w")
    assert dataclasses.replace(loaded, tensors={}, source="") == dataclasses.replace(changed, tensors={}, source="")
    assert {name: tensor.dtype for name, tensor in loaded.tensors.items()} == dict.fromkeys(tensors, np.dtype(dtype))
    assert_same(loaded.tensors, tensors)
    assert list(loaded.tensors) == list(tensors)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w"]


def test_safetensors_gets_the_numbers_of_every_kind_of_array(tmp_path):
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    tensors = {"transposed": base.T, "steps": base[::2, ::-3], "scalar": np.float32(7), "empty": np.zeros((0, 3))}
    tensors |= {"big": np.arange(3, dtype=">i4"), "float8": np.ones(2, ml_dtypes.float8_e5m2)}
    write_safetensors(tmp_path / "a.safetensors", tensors)
    back = read_state_dict(tmp_path / "a.safetensors")
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor, strict=name != "big")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_directory_is_replaced_as_a_whole_or_not_at_all(golden, tmp_path, monkeypatch):
    save_converted(golden, tmp_path / "w")
    save_converted(pretrained.load(WEIGHTS, num_classes=2), tmp_path / "w")
    rename = Path.rename

    def interrupted(source, target):
        if source.name == "new":
            raise KeyboardInterrupt
        return rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", None)  # a full disk
        with pytest.raises(TypeError):
            save_converted(golden, tmp_path / "w")
    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_converted(golden, tmp_path / "w")
    assert pretrained.load(tmp_path / "w").settings["num_classes"] == 2
    (tmp_path / "w/README.md").write_text("my model card")
    monkeypatch.undo()
    save_converted(pretrained.load(WEIGHTS, num_classes=2), tmp_path / "w")
    assert (tmp_path / "w/README.md").read_text() == "my model card"
    (tmp_path / "w/README.md").unlink()
    assert len({path.stat().st_mode for path in (tmp_path / "w").iterdir()}) == 1  # who reads one file reads all
    assert {path.name for path in tmp_path.rglob("*")} == {"w", "config.json", "weights.safetensors"}


def test_a_new_head_and_larger_images(golden):
    loaded = pretrained.load(WEIGHTS, num_classes=3, image_size=(48, 64), seed=5)
    assert loaded.tensors["head.weight"].shape == (3, 32)
    assert loaded.tensors["pos_embed"].shape == (1, 48, 32)
    assert loaded.changes == ("new head for 3 classes", "position embedding resized from 6 x 6 to 6 x 8 patches")
    again = pretrained.load(WEIGHTS, num_classes=3, seed=5).tensors["head.weight"]
    other = pretrained.load(WEIGHTS, num_classes=3, seed=6).tensors["head.weight"]
    np.testing.assert_array_equal(loaded.tensors["head.weight"], again)
    assert (again != other).any()
    assert 0.01 < again.std() < 0.03
    model = convit_jax.load_pretrained(WEIGHTS, num_classes=3, image_size=(48, 64), dtype="bfloat16")
    assert model(np.zeros((2, 48, 64, 3), np.float32)).shape == (2, 3)
    assert pretrained.load(WEIGHTS, num_classes=10).changes == ()


@pytest.mark.parametrize("name", ["mine.safetensors", "mine"])
def test_a_model_is_saved_from_python(tmp_path, name):
    sizes = {"embed_dim": 24, "depth": 2, "local_up_to_layer": 0, "num_heads": 2, "patch_size": 8}
    model = convit_jax.create_model("deit_tiny", num_classes=2, image_size=(48, 64), dtype="bfloat16", **sizes)
    convit_jax.save_pretrained(model, tmp_path / name, class_names=np.array(["ant", "bee"]), mean=[0.5] * 3)
    again = convit_jax.load_pretrained(tmp_path / name)
    image = np.random.default_rng(0).integers(0, 256, (1, 48, 64, 3), np.uint8)
    np.testing.assert_array_equal(again(again.preprocess(image)), model(again.preprocess(image)))
    assert (again.class_names, again.preprocess.how) == (("ant", "bee"), Preprocessing(mean=(0.5,) * 3))
    with pytest.raises(UserError, match="3 class_names for a model of 2 classes"):
        convit_jax.save_pretrained(model, tmp_path / name, class_names=["a", "b", "c"])
    small = convit_jax.create_model("deit_tiny", image_size=32, **sizes)
    convit_jax.save_pretrained(small, tmp_path / name)
    assert pretrained.load(tmp_path / name).preprocessing == Preprocessing(crop_ratio=1.0)
    again.reset_classifier(0)
    convit_jax.save_pretrained(again, tmp_path / name)  # with what it was loaded with
    again.adapter = nnx.Param(np.zeros(3))
    with pytest.raises(UserError, match="adapter"):
        convit_jax.save_pretrained(again, tmp_path / name)
    assert pretrained.load(tmp_path / name).preprocessing == again.preprocess.how


def test_a_saved_model_still_knows_the_classes_of_imagenet(tmp_path):
    for count in (1000, 600, 3):  # 600 has both cranes
        loaded = dataclasses.replace(pretrained.load(WEIGHTS, num_classes=count), class_names=(*IMAGENET,)[:count])
        convit_jax.save_pretrained(loaded.model(), tmp_path / "mine.safetensors")
        labels, remark = pretrained.match_classes((*IMAGENET,)[:count], pretrained.load(tmp_path / "mine.safetensors"))
        assert (labels.tolist(), bool(remark)) == ([*range(count)], count == 600)


def test_a_saved_model_keeps_sizes_that_its_shapes_leave_open(tmp_path):
    sizes = {"embed_dim": 24, "depth": 2, "local_up_to_layer": 1, "num_heads": 2, "patch_size": 8, "num_classes": 2}
    model = convit_jax.create_model("convit_tiny", image_size=(16, 32), pos_embed_class_token=True, **sizes)
    convit_jax.save_pretrained(model, tmp_path / "mine.safetensors")
    assert convit_jax.load_pretrained(tmp_path / "mine.safetensors").grid == (2, 4)  # 9 positions, also 3 x 3


def test_weights_without_a_head_take_a_new_one(golden, tmp_path):
    headless = pretrained.load(WEIGHTS, num_classes=0)
    write_safetensors(tmp_path / "backbone.safetensors", headless.tensors)
    model, whole = (convit_jax.load_pretrained(path) for path in (tmp_path / "backbone.safetensors", WEIGHTS))
    images = np.ones((1, 48, 48, 3), np.float32)
    np.testing.assert_allclose(model(images), whole.features(images), atol=1e-6)
    assert convit_jax.load_pretrained(tmp_path / "backbone.safetensors", num_classes=3)(images).shape == (1, 3)


def test_shards_are_read_by_their_index(golden, tmp_path):
    names = sorted(golden.tensors)
    weight_map = {}
    for number, part in enumerate((names[:30], names[30:])):
        write_safetensors(tmp_path / f"{number}.safetensors", {name: golden.tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, f"{number}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same({**pretrained.load(tmp_path).tensors}, {**golden.tensors})


def test_float32_does_without_the_kernel_that_does_not_take_it(golden):
    faster = pretrained.with_behaviour(golden, dtype="bfloat16", attention="cudnn")
    assert faster.settings["attention"] == "cudnn"
    assert pretrained.with_behaviour(faster, dtype="float32").settings["attention"] == "xla"
    with pytest.raises(UserError, match=r"attention.*cudnn.*float32"):
        pretrained.with_behaviour(golden, attention="cudnn")


def test_mistakes_are_said_in_a_sentence(golden, tmp_path):
    broken = {name: tensor for name, tensor in golden.tensors.items() if name != "blocks.2.norm1.bias"}
    save_torch(tmp_path / "broken.pth", {**broken, "other": np.ones(1)})
    save_converted(golden, tmp_path / "w")
    (tmp_path / "json").mkdir()
    save_converted(golden, tmp_path / "json/w")
    (tmp_path / "json/w/config.json").write_text('{"model": {}}')
    (tmp_path / "hub").mkdir()
    write_safetensors(tmp_path / "hub/model.safetensors", {"head.weight": np.ones((2, 2))})
    (tmp_path / "hub/config.json").write_text("{}")
    for source, options, message in (
        (tmp_path / "hub", {}, r"^(?!.*config\.json).*hub"),
        ("convit_tinny", {}, r"no file or directory convit_tinny, .* did you mean 'convit_tiny'"),
        (tmp_path, {}, "neither a run directory"),
        (WEIGHTS, {"image_size": 50}, "image_size 50 x 50 is not a multiple of patch_size 8"),
        (WEIGHTS, {"num_classes": -1}, "num_classes is -1: it must be at least 0"),
        (WEIGHTS, {"dtyp": "bfloat16"}, "no setting 'dtyp', did you mean 'dtype'"),
        (WEIGHTS, {"dtype": "float16"}, "choose float32 or bfloat16"),
        (tmp_path / "broken.pth", {}, r"do not fit .*missing: blocks.2.norm1.bias; unexpected: other"),
        (tmp_path / "json/w", {}, r"cannot read .*config.json: it is damaged \(KeyError: 'preprocessing'"),
        (tmp_path / "w", {"ema": True}, "no state dict under 'model_ema'"),
    ):
        with pytest.raises(UserError, match=message):
            convit_jax.load_pretrained(source, **options)


# ---- The Hub ----------------------------------------------------------------------------


def test_a_repository_brings_its_preprocessing(golden, tmp_path, monkeypatch):
    write_safetensors(tmp_path / "model.safetensors", golden.tensors)
    how = {"crop_pct": 0.9, "interpolation": "bilinear", "mean": [0.5] * 3, "std": [0.25] * 3}
    (tmp_path / "config.json").write_text(json.dumps({"num_classes": 10, "pretrained_cfg": how}))
    asked = []

    def fetch(repo, name):
        asked.append((repo, name))
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    loaded = pretrained.load("convit_tiny")
    repo = "timm/convit_tiny.fb_in1k"
    assert asked == [(repo, "config.json"), (repo, "model.safetensors")]
    assert loaded.preprocessing == Preprocessing(0.9, "bilinear", (0.5,) * 3, (0.25,) * 3)
    assert_same(loaded.tensors, golden.tensors)


@pytest.mark.parametrize("source", ["convit_tiny", "runs/none"])
def test_no_connection_is_said_in_a_sentence(source, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=f"no file or directory {source}, and the Hub does not give"):
        pretrained.load(source)


# ---- Runs -------------------------------------------------------------------------------


def save_run(directory, golden, steps):
    """A run directory with steps {step: (val_top1, val_ema_top1)}; all parameters are the step's number."""
    lines = []
    for step, (top1, ema_top1) in steps.items():
        params = jax.tree.map(lambda leaf, step=step: np.full_like(leaf, step), golden.params())
        state = {"params": params, "opt": np.zeros(2)} | (
            {} if ema_top1 is None else {"ema": jax.tree.map(np.negative, params)}
        )
        ocp.save(directory / "checkpoints" / str(step), {"state": state, "metrics": np.zeros(1)})
        lines.append({"step": step, "val_top1": top1, "val_ema_top1": ema_top1})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"crop_ratio": 1.0, "mean": [0.3] * 3, "std": [0.4] * 3}
    model = {**golden.settings, "name": "convit_tiny", "num_classes": None}
    (directory / "config.json").write_text(json.dumps({"model": model, "data": data}))
    (directory / "run.json").write_text(json.dumps({"classes": 10, "class_names": list("0123456789")}))


def test_best_and_latest_of_a_run_and_its_average(golden, tmp_path):
    save_run(tmp_path / "run", golden, {6: (90.0, 10.0), 12: (10.0, 90.0)})

    def head_bias(**which):
        return pretrained.load(tmp_path / "run", **which).tensors["head.bias"][0]

    assert (head_bias(), head_bias(which="latest"), head_bias(which=6)) == (6, 12, 6)
    assert (head_bias(ema=True), head_bias(ema=True, which="latest"), head_bias(ema=True, which=6)) == (-12, -12, -6)
    loaded = pretrained.load(tmp_path / "run")
    assert loaded.class_names == tuple("0123456789")
    assert loaded.settings == golden.settings
    assert loaded.preprocessing == Preprocessing(1.0, "bicubic", (0.3,) * 3, (0.4,) * 3)
    with pytest.raises(UserError, match="no checkpoint 'newest': choose best or latest"):
        head_bias(which="newest")
    with pytest.raises(UserError, match=r"cannot read .*checkpoints/7 .*: try the other one"):
        head_bias(which=7)
    (tmp_path / "run/run.json").write_text("{}")
    with pytest.raises(UserError, match=r"^cannot read [^:]*/run\.json: it is damaged"):
        head_bias()


def test_a_run_that_lacks_something(golden, tmp_path):
    save_run(tmp_path / "run", golden, {6: (90.0, None)})
    with pytest.raises(UserError, match="kept no moving average"):
        pretrained.load(tmp_path / "run", ema=True)
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="has not saved a checkpoint yet"):
        pretrained.load(tmp_path / "empty")


def test_a_training_starts_from_weights(golden, golden_config, tmp_path, capsys, monkeypatch):
    golden_config.init_from = str(WEIGHTS)
    golden_config.optim.lr = golden_config.optim.min_lr = golden_config.optim.warmup_lr = 0.0
    golden_config.model.image_size = 40
    compared = {}
    monkeypatch.setattr(setup, "check_same", lambda facts, *_: compared.update(facts))
    train(golden_config, tmp_path)
    resized = pretrained.load(WEIGHTS, image_size=40)
    assert compared["the digest of the weights of init_from"] == pretrained.fingerprint(resized.params())
    assert_same(saved(tmp_path)["state"]["params"], resized.params())
    said = "position embedding resized from 6 x 6 to 5 x 5 patches"
    assert f"Starting from {WEIGHTS}; {said}\n" in capsys.readouterr().out
    train(golden_config, tmp_path)  # goes on with the run, not from the weights again
    printed = capsys.readouterr().out
    assert "Already finished at step 1" in printed
    assert "Starting from" not in printed


def test_weights_of_another_depth_stop_a_training_before_anything_is_written(golden_config, tmp_path):
    golden_config.init_from, golden_config.model.depth = str(WEIGHTS), 5
    with pytest.raises(UserError, match=r"has depth=4, but config.model asks for depth=5: set model.name"):
        train(golden_config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
