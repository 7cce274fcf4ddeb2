"""Declared fields, config files, overrides, and what is said of a wrong one."""

import importlib
import json

import pytest
from conftest import ROOT

import convit_jax
from configs import ablations
from convit_jax.config import check_config, compare_configs, flatten, load_config, load_run_config
from convit_jax.errors import UserError
from convit_jax.models.variants import settings_of
from convit_jax.training.optimizer import frozen_mask

DIGITS = f"--config={ROOT}/configs/digits.py"


def load(name):
    return importlib.import_module(f"configs.{name}").get_config()


@pytest.mark.parametrize("model", convit_jax.list_models())
def test_paper_config_is_its_model_with_the_recipe(model):
    kind, size, *plus = model.split("_")
    config = load("_".join([kind, {"tiny": "ti", "small": "s", "base": "b"}[size], *plus]))
    assert config.model.name == model
    assert config.batch_size == (512 if plus else 1024)
    assert config.optim.lr * config.batch_size / 512 == (4e-4 if plus else 1e-3)
    assert (config.epochs, config.optim.weight_decay, config.model.drop_path_rate) == (300, 0.05, 0.1)
    assert settings_of(config.model)["depth"] == 12


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs").glob("[!_]*.py")))
def test_config_is_valid(name):
    check_config(load_config([f"--config=configs/{name}.py"]))


def test_ablations_are_the_rows_of_table_3():
    rows = {row: ablations.get_config(row) for row in ablations.ROWS}
    assert flatten(rows["a"]) == flatten(load("convit_s_plus"))
    assert flatten(rows["e"]) == flatten(load("deit_s_plus"))
    names = {"gpsa_blocks": {"attn": {"gating_param": 0, "v": {"kernel": 0}}, "mlp": {"fc1": {"kernel": 0}}}}
    # Train gating, convolutional init, train GPSA.
    table = {"b": (0, 1, 1), "c": (1, 0, 1), "d": (0, 0, 1), "f": (0, 1, 0), "g": (0, 0, 0)}
    for row, flags in table.items():
        gating, conv_init, gpsa = map(bool, flags)
        config = rows[row]
        frozen = frozen_mask(names, config.optim.frozen)["gpsa_blocks"]
        assert frozen["attn"]["gating_param"] is not gating, row
        assert frozen["attn"]["v"]["kernel"] is not gpsa, row
        assert frozen["mlp"]["fc1"]["kernel"] is False, row
        assert config.model.gate_init == (None if gating else 0.0), row
        assert (config.model.conv_init is not False) is conv_init, row


def test_overrides_have_the_type_of_their_field():
    fields = ["data.mean=(0.1, 0.2, 0.3)", "model.image_size=(16, 8)", "model.qkv_bias=True", "optim.lr=1"]
    fields += ["optim.freeze=6", "batch_size=8", "optim.warmup_epochs=2"]
    config = load_config(["--config.steps=7", DIGITS, *(f"--config.{field}" for field in fields)])
    assert (config.steps, config.data.mean, config.model.image_size) == (7, (0.1, 0.2, 0.3), (16, 8))
    assert config.model.qkv_bias is True
    assert (config.optim.freeze, config.batch_size, config.optim.warmup_epochs) == (6, 8, 2.0)
    assert load_config([DIGITS, "--config.optim.freeze=backbone"]).optim.freeze == "backbone"
    assert isinstance(config.optim.lr, float)
    with pytest.raises(UserError, match="no config: add --config=FILE"):
        load_config(["--config.epochs=3"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("config.optim.wieght_decay = 0.5", "sets 'optim.wieght_decay', did you mean 'optim.weight_decay'"),
        ("del config.optim.lr", "lacks 'optim.lr': start from default"),
    ],
)
def test_wrong_config_file(tmp_path, change, message):
    begin = "from configs import default\ndef get_config():\n    config = default.get_config()\n"
    (tmp_path / "mine.py").write_text(f"{begin}    {change}\n    return config\n")
    with pytest.raises(UserError, match=message):
        load_config([f"--config={tmp_path}/mine.py"])


def test_config_of_a_run_has_its_values_on_all_devices(tmp_path):
    config = load_config([DIGITS, "--config.mesh.fsdp=8", "--config.epochs=3"])
    (tmp_path / "config.json").write_text(config.to_json_best_effort())
    loaded = load_run_config(tmp_path)
    assert (loaded.epochs, loaded.mesh.fsdp, loaded.mesh.data) == (3, 1, -1)
    assert loaded.data.mean == (0.305, 0.305, 0.305)
    assert compare_configs(flatten(loaded), flatten(config), {"mesh.fsdp"}) == []
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        load_run_config(tmp_path)


def test_fields_that_a_saved_config_lacks_had_their_default():
    config = load("digits")
    saved = json.loads(config.to_json_best_effort())
    del saved["optim"]["clip_norm"], saved["locality"]
    assert compare_configs(flatten(config), flatten(saved), ()) == []
    config.optim.clip_norm = 1.0
    assert compare_configs(flatten(config), flatten(saved), ()) == ["optim.clip_norm was 0.0, is 1.0"]
