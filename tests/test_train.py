"""train.py as a user starts it: mistakes, and the command that it suggests."""

import re

import pytest
from conftest import says

import train
from convit_jax.config import load_config


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("--config.batch_size=many", "flag --config.batch_size=many: invalid literal for int()"),
        ("--config=configs/ablations.py:x", "there is no ablation 'x'"),
        ("--epochs=3", "there is no flag --epochs, did you mean --config.epochs?"),
        ("--config.data.name=digit", "cannot open the TFDS data set 'digit' ("),
    ],
)
def test_a_mistake_is_one_sentence(argument, sentence, tmp_path):
    assert says("train.py", argument, f"--workdir={tmp_path}").startswith(f"train.py: {sentence}")


def test_the_command_for_your_own_images_starts_from_weights_of_its_own_model():
    config = load_config(re.search(r"train\.py (.*) with FOLDER/train", train.SUMMARY)[1].split())
    assert config.init_from == config.model.name
    assert (config.data.name, config.data.dir, config.model.image_size) == ("folder", "FOLDER", 224)
