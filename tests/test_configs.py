"""Every config file: the right model and recipe, every field explained."""

import importlib
import re

import pytest
from conftest import ROOT

import convit_jax
from configs import ablations, default
from convit_jax.config import flatten
from convit_jax.errors import UserError
from convit_jax.models.variants import model_settings
from convit_jax.training.optimizer import frozen_mask, peak_learning_rate
from convit_jax.training.plan import model_arguments

SIZES = {"ti": "tiny", "s": "small", "b": "base"}
PAPER = {
    f"{kind}_{size}{plus}": f"{kind}_{name}{plus}"
    for kind in ("convit", "deit")
    for size, name in SIZES.items()
    for plus in ("", "_plus")
}


def load(name):
    return importlib.import_module(f"configs.{name}").get_config()


def test_the_twelve_models_of_the_paper_have_a_config_each():
    assert sorted(PAPER.values()) == sorted(convit_jax.list_models())


@pytest.mark.parametrize("name", PAPER)
def test_a_paper_config_is_its_model_with_the_papers_recipe(name):
    config = load(name)
    assert config.model.name == PAPER[name]
    plus = name.endswith("plus")
    assert config.batch_size == (512 if plus else 1024)
    assert peak_learning_rate(config.optim, config.batch_size) == (4e-4 if plus else 1e-3)
    assert (config.epochs, config.optim.weight_decay, config.model.drop_path_rate) == (300, 0.05, 0.1)
    assert model_settings(**model_arguments(config, 1000))["depth"] == 12


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs").glob("[!_]*.py")))
def test_a_config_has_the_fields_of_the_default_and_names_its_command(name):
    config = load(name)
    assert set(flatten(config)) == set(flatten(default.get_config()))
    command = (
        "python train.py"
        if name == "digits"
        else f"--config=configs/{'convit_s' if name == 'default' else name}"
    )
    assert command in (ROOT / f"configs/{name}.py").read_text()


def test_every_field_has_its_comment():
    lines = (ROOT / "configs/default.py").read_text().splitlines()
    fields = [line for line in lines if re.match(r"    config\.", line)]
    assert len(fields) > 50
    assert [line for line in fields if "#" not in line] == []


def test_a_mistyped_field_in_a_config_file_is_an_error():
    config = default.get_config()
    with pytest.raises(AttributeError, match="weight_decay"):
        config.optim.wieght_decay = 0.5


def test_ablations_are_the_rows_of_table_3():
    rows = {row: ablations.get_config(row) for row in ablations.ROWS}
    assert rows["a"].to_dict() == load("convit_s_plus").to_dict()
    assert rows["e"].to_dict() == load("deit_s_plus").to_dict()
    table = {  # train gating, convolutional init, train GPSA
        "b": (False, True, True),
        "c": (True, False, True),
        "d": (False, False, True),
        "f": (False, True, False),
        "g": (False, False, False),
    }
    names = {"gpsa_blocks": {"attn": {"gating_param": 0, "v": {"kernel": 0}}, "mlp": {"fc1": {"kernel": 0}}}}
    for row, (gating, conv_init, gpsa) in table.items():
        config = rows[row]
        frozen = frozen_mask(names, config.optim.frozen)["gpsa_blocks"]
        assert frozen["attn"]["gating_param"] is not gating, row
        assert frozen["attn"]["v"]["kernel"] is not gpsa, row
        assert frozen["mlp"]["fc1"]["kernel"] is False, row
        assert config.model.gate_init == (None if gating else 0.0), row
        assert (config.model.conv_init is not False) is conv_init, row
    with pytest.raises(UserError, match="no ablation 'h'"):
        ablations.get_config("h")
