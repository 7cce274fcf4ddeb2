"""Preparing ImageNet, all but TFDS's builder: the checks around it, and that nothing half-made stays.

The builder itself runs in tests/prepare_for_real.py.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from conftest import ROOT

from convit_jax.data import prepare as module
from convit_jax.data.prepare import already_there, prepare, space_needed, stopped, workspace
from convit_jax.data.tfds_progress import Progress
from convit_jax.errors import UserError
from tests.tars import write_ilsvrc

UNFINISHED = ".imagenet2012-unfinished"


@pytest.fixture
def tars(tmp_path):
    (tmp_path / "tars").mkdir()
    validation = {"ILSVRC2012_val_00000001.JPEG": b"image"}
    write_ilsvrc(tmp_path / "tars", {"n01440764_18.JPEG": b"image"}, validation)
    return tmp_path / "tars"


@pytest.fixture
def built(monkeypatch, tfds_data):
    """What TFDS's builder once made, put where it makes it, in its place; set in it what shall go wrong."""
    wrong = {}

    def build(work, contents, file_format):
        if "build" in wrong:
            raise wrong["build"]
        target = work / "imagenet2012/5.1.0"
        shutil.copytree(tfds_data / file_format / "imagenet2012/5.1.0", target)
        return target

    def check(directory, contents, file_format):
        if "check" in wrong:
            raise wrong["check"]
        return {"train": 1_281_167, "validation": 8}

    monkeypatch.setattr(module, "require_packages", lambda: None)
    monkeypatch.setattr(module, "build", build)
    monkeypatch.setattr(module, "check", check)
    return wrong


def run(*arguments, **kwargs):
    command = [sys.executable, "-W", "error", "-m", "convit_jax.data.prepare", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **kwargs)


@pytest.mark.parametrize("file_format", [None, "array_record", "tfrecord"])
def test_what_was_built_and_checked_gets_its_name_and_is_found_again(
    tars, built, tmp_path, file_format, capsys
):
    output = tmp_path / "data"
    prepare(tars, output, file_format)
    assert [str(path.relative_to(output)) for path in output.glob("*/*")] == ["imagenet2012/5.1.0"]
    assert not (output / UNFINISHED).exists()
    said = capsys.readouterr().out
    assert "classes 1, validation images 1\n" in said
    assert "  train      1,281,167 images, all of ImageNet's\n" in said
    assert "  validation         8 images, a part of ImageNet's 50,000\n" in said
    assert said.endswith(f"--config.data.dir={output}\n")

    built["build"] = AssertionError("must not run again")
    prepare(tars, output, file_format)
    as_format = file_format or "array_record"
    assert capsys.readouterr().out == (
        f"{output}/imagenet2012/5.1.0 is there already, as {as_format}, with train 24 and validation 8 "
        "images. Nothing to do.\n"
    )


def test_too_few_images_in_a_tar_of_the_published_size_are_damage_and_in_another_a_part():
    train = module.PUBLISHED["train"]
    assert module.share(1_281_167, train.bytes, train) == "all of ImageNet's"
    assert module.share(1_281_166, train.bytes, train).endswith(
        "has the published size: it is damaged, compare its checksum with the published one"
    )
    assert module.share(1_281_166, train.bytes - 10240, train) == "a part of ImageNet's 1,281,167"


@pytest.mark.parametrize("where", ["build", "check"])
@pytest.mark.parametrize("wrong", [UserError("TFDS made no train split."), KeyboardInterrupt()])
def test_what_goes_wrong_leaves_nothing(tars, built, tmp_path, where, wrong):
    built[where] = wrong
    with pytest.raises(type(wrong)):
        prepare(tars, tmp_path / "data")
    assert os.listdir(tmp_path / "data") == []


def test_bad_tars_are_refused_before_anything_is_written(tars, built, tmp_path):
    (tars / "ILSVRC2012_img_train.tar").unlink()
    with pytest.raises(UserError, match=r"has no ILSVRC2012_img_train\.tar"):
        prepare(tars, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def without(info, split):
    facts = json.loads(info.read_text())
    facts["splits"] = [each for each in facts["splits"] if each["name"] != split]
    info.write_text(json.dumps(facts))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda made: without(made / "dataset_info.json", "train"), "has no train split (TFDS makes such"),
        (lambda made: without(made / "dataset_info.json", "validation"), "has no validation split"),
        (lambda made: (made / "dataset_info.json").unlink(), "has no readable dataset_info.json"),
        (lambda made: (made / "dataset_info.json").write_text('{"splits'), "has no readable dataset_info"),
        (lambda made: next(made.glob("*train*")).unlink(), "has 1 of the 2 files of train"),
    ],
    ids=["train", "validation", "no info", "half an info", "a file less"],
)
def test_a_data_set_that_is_not_whole_is_neither_taken_nor_touched(tfds_data, damage, said):
    made = tfds_data / "tfrecord/imagenet2012/5.1.0"
    damage(made)
    before = sorted(made.iterdir())
    with pytest.raises(UserError) as caught:
        already_there(tfds_data / "tfrecord", None)
    assert str(caught.value).startswith(f"{made} {said}")
    assert str(caught.value).endswith("move it away or remove it, and start again.")
    assert sorted(made.iterdir()) == before


def test_a_data_set_in_another_format_than_asked_for_is_refused(tfds_data):
    with pytest.raises(UserError, match="already, as tfrecord: for array_record give another --output"):
        already_there(tfds_data / "tfrecord", "array_record")


def test_nothing_there_or_tfds_at_work_there_is_no_data_set(tmp_path):
    assert already_there(tmp_path / "none", None) is None
    (tmp_path / "imagenet2012/incomplete.ABC_5.1.0").mkdir(parents=True)
    assert already_there(tmp_path, None) is None


def test_a_missing_package_is_named_with_the_commands_that_bring_it(monkeypatch):
    monkeypatch.setattr(module, "REQUIRED", {"os": "os", "no_such": "no-such", "nor_this": "nor-this"})
    with pytest.raises(UserError) as caught:
        module.require_packages()
    assert str(caught.value).startswith("no-such and nor-this are not installed, needed for this step only")
    assert 'pip install ".[prepare]"' in str(caught.value)
    assert "pip install -r requirements-prepare.txt" in str(caught.value)


def test_what_is_required_is_what_the_extra_installs():
    lines = (ROOT / "requirements-prepare.txt").read_text().splitlines()
    assert set(module.REQUIRED.values()) == {line.split(">")[0] for line in lines}


def test_leftovers_of_a_killed_run_are_removed_and_said(tmp_path, capsys):
    (tmp_path / UNFINISHED / "imagenet2012/incomplete.X_5.1.0").mkdir(parents=True)
    (tmp_path / UNFINISHED / "lock").touch()
    with workspace(tmp_path, 0) as work:
        assert os.listdir(work) == ["lock"]
    assert capsys.readouterr().out == f"Removing what an interrupted preparation left in {work}\n"
    assert os.listdir(tmp_path) == []


def test_two_at_once_in_one_folder_are_refused_and_the_first_goes_on(tmp_path):
    with workspace(tmp_path, 0) as work:
        (work / "shard").touch()
        with (
            pytest.raises(UserError, match="another process prepares imagenet2012 in"),
            workspace(tmp_path, 0),
        ):
            pass
        assert sorted(os.listdir(work)) == ["lock", "shard"]


def test_a_disk_that_is_too_small_is_refused_with_both_numbers(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage(12_345_678_901))
    needed = space_needed(147_897_477_120 + 6_744_924_160)
    with (
        pytest.raises(UserError, match=r"has 12\.35 GB free, 157\.74 GB are needed"),
        workspace(tmp_path, needed),
    ):
        pass
    assert os.listdir(tmp_path) == []


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write into .*/file \(Not a directory\)"):
        workspace(tmp_path / "file", 0).__enter__()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
            "the disk of out is full (before the first image)",
        ),
        (RuntimeError("write() failed: Disk quota exceeded; at byte 2"), "disk of out is full"),
        (AssertionError("Two examples\nshare a key!"), "(AssertionError: Two examples share a key!)."),
        (ValueError("x" * 5000), f"(ValueError: {'x' * 300})."),
    ],
)
def test_what_stops_tfds_becomes_a_sentence(error, said):
    sentence = stopped(error, Progress({}, 0), Path("out"))
    assert said in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the following arguments are required: --tars, --output"),
        (["--tars=a", "--output=b", "--format=tar"], "invalid choice: 'tar' (choose from"),
        (["--tars=a", "--output=b", "--fromat=x"], "unrecognized arguments: --fromat=x"),
    ],
)
def test_the_command_says_one_sentence(arguments, said, tmp_path):
    done = run(*arguments, env={**os.environ, "HOME": str(tmp_path)})
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("prepare: ")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr


def test_the_command_imports_neither_jax_nor_tensorflow(tfds_data):
    code = (
        "import sys; from convit_jax.data.prepare import main; "
        f"sys.argv[1:] = ['--tars=none', '--output={tfds_data}/tfrecord']; main(); "
        "sys.exit(str({'jax', 'tensorflow', 'numpy'} & {*sys.modules} or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip() == ""
    assert "is there already, as tfrecord" in done.stdout
