"""train.py as a user starts it: mistakes, and the command that it suggests."""

import re

import pytest
from conftest import says

import train
from convit_jax.config import load_config


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("--config.optim.lrr=3", "the config has no field 'optim.lrr', did you mean 'optim.lr'?"),
        ("--config.batch_size=many", "flag --config.batch_size=many: invalid literal for int()"),
        ("--config=configs/ablations.py:x", "there is no ablation 'x'"),
        ("--epochs=3", "there is no flag --epochs, did you mean --config.epochs?"),
        ("epochs=3", "unexpected argument 'epochs=3': flags look like --config.epochs=10."),
        ("--config.data.name=digit", "data.name is 'digit', did you mean 'digits'?"),
        ("--config.model.name=convit_smal", "there is no model 'convit_smal', did you mean 'convit_small'?"),
    ],
)
def test_a_mistake_is_one_sentence(argument, sentence, tmp_path):
    assert says("train.py", argument, f"--workdir={tmp_path}").startswith(f"train.py: {sentence}")


def test_the_command_for_your_own_images_starts_from_weights_of_its_own_model():
    config = load_config(re.search(r"train\.py (.*) with FOLDER/train", train.SUMMARY)[1].split())
    assert config.init_from == config.model.name
    assert (config.data.name, config.data.dir, config.model.image_size) == ("folder", "FOLDER", 224)
