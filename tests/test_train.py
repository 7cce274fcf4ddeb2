"""train.py as a user starts it: what each mistake prints."""

import subprocess
import sys

import pytest
from conftest import ROOT, says


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        (
            "--config=configs/convit_t.py",
            "there is no config file 'configs/convit_t.py', did you mean 'configs/convit_ti.py'",
        ),
        ("--config.optim.lrr=3", "the config has no field 'optim.lrr', did you mean 'optim.lr'?"),
        ("--config.lr=3", "the config has no field 'lr', did you mean 'optim.lr'?"),
        ("--config.zzz=3", "the config has no field 'zzz'. configs/default.py explains all of them."),
        ("--config.batch_size=many", "flag --config.batch_size=many: invalid literal for int()"),
        ("--config=configs/ablations.py:x", "there is no ablation 'x': choose one of a, b, c"),
        ("--wrkdir=x", "Unknown command line flag 'wrkdir'. Did you mean: workdir"),
        ("--epochs=3", "there is no flag --epochs, did you mean --config.epochs?"),
        ("--config.data.dir=/tmp", "data.dir is set but data.name is digits, which needs none"),
        ("epochs=3", "unexpected argument 'epochs=3': flags look like --config.epochs=10."),
        ("--config.data.name=folder", "data.name is folder but data.dir is empty: add --config.data.dir="),
        ("--config=configs/convit_s.py", "there is no TFDS data set 'imagenet2012' in "),
        (
            "--config.data.name=digit",
            "data.name is 'digit', did you mean 'digits'? there is no TFDS data set",
        ),
        ("--config.model.name=convit_smal", "there is no model 'convit_smal', did you mean 'convit_small'?"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(argument, sentence, tmp_path):
    assert says("train.py", argument, f"--workdir={tmp_path}").startswith(f"train.py: {sentence}")


def test_a_mistyped_field_in_a_config_file_is_named(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from configs import digits\ndef get_config():\n"
        "    config = digits.get_config()\n    config.optim.lrr = 3\n    return config\n"
    )
    said = says("train.py", f"--config={file}", f"--workdir={tmp_path}/run")
    assert said.startswith("train.py: the config file sets 'lrr', which is no field, did you mean 'lr'?")


def test_a_config_file_that_is_not_there_is_named_from_any_directory(tmp_path):
    command = [sys.executable, ROOT / "train.py", "--config", "configs/digits.py", "--config.steps=2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.stderr.startswith("train.py: there is no config file 'configs/digits.py'")


def test_an_empty_image_folder_is_named(tmp_path):
    (tmp_path / "train").mkdir()
    train = tmp_path / "train"
    flags = ("--config=configs/convit_s.py", "--config.data.name=folder", f"--config.data.dir={tmp_path}")
    said = says("train.py", *flags, f"--workdir={tmp_path}/run")
    assert (
        said == f"train.py: {train} has no class folders: put the images of each class into {train}/CLASS/."
    )
