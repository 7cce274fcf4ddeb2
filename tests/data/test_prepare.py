"""Preparing ImageNet: the checks around TFDS's builder, which itself runs in tests/prepare_for_real.py."""

import os
import shutil
import subprocess
import sys
from collections import namedtuple
from types import SimpleNamespace

import pytest
import tensorflow_datasets
from conftest import ROOT

from convit_jax.data import prepare
from tests.tars import archive, write_ilsvrc

TRAIN, VALIDATION = prepare.TARS


def validation(*numbers):
    return {f"ILSVRC2012_val_{number:08d}.JPEG": b"image" for number in numbers}


@pytest.fixture
def tars(tmp_path, monkeypatch):
    """A folder with complete tars."""
    folder = tmp_path / "tars"
    folder.mkdir()
    write_ilsvrc(folder, {"n01440764_18.JPEG": b"image"}, validation(1, 2, 3))
    monkeypatch.setattr(prepare, "TARS", {name: (folder / name).stat().st_size for name in (TRAIN, VALIDATION)})
    return folder


@pytest.fixture
def builder(tfds_data, monkeypatch):
    """TFDS's builder, which copies what it once made: 24 and 8 images; `error` is raised if set."""
    fake = SimpleNamespace(error=None, calls=0)

    def make(name, data_dir):
        def download_and_prepare(file_format, download_config):
            fake.calls += 1
            shutil.copytree(tfds_data / file_format / name / "5.1.0", fake.data_dir)
            if fake.error:
                raise fake.error

        fake.data_dir = f"{data_dir}/{name}/5.1.0"
        fake.info = tensorflow_datasets.builder_from_directory(tfds_data / "tfrecord" / name / "5.1.0").info
        fake.download_and_prepare = download_and_prepare
        return fake

    monkeypatch.setattr(tensorflow_datasets, "builder", make)
    monkeypatch.setattr(prepare, "IMAGENET_IMAGES", {"train": 24, "validation": 8})
    monkeypatch.setattr(prepare.signal, "signal", lambda *_: None)
    return fake


@pytest.fixture
def run(tars, tmp_path, capsys):
    """A function that runs the command: (exit status, standard output, standard error)."""

    def command(*arguments):
        status = prepare.main([f"--tars={tars}", f"--output={tmp_path}/data", *arguments])
        out, err = capsys.readouterr()
        assert err.count("\n") == (status != 0), err
        return status, out, err

    return command


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_a_complete_data_set_gets_its_name_and_is_not_replaced(file_format, builder, run, tmp_path):
    output = tmp_path / "data"
    status, out, _ = run(f"--format={file_format}")
    assert status == 0
    assert out.splitlines()[:2] == [
        "train: 24 of ImageNet's 24 images",
        "validation: 8 of ImageNet's 8 images",
    ]
    assert out.endswith(f"--config.data.dir={output}\n")
    assert [str(path.relative_to(output)) for path in output.glob("*/*")] == ["imagenet2012/5.1.0"]
    assert list(output.glob(f"*/*/*train.{file_format}*"))
    assert os.listdir(output) == ["imagenet2012"]
    status, _, err = run()
    assert (status, builder.calls) == (1, 1)
    assert f"{output}/imagenet2012/5.1.0 exists already: remove it" in err


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (OSError(28, "No space left on device"), 1, "TFDS failed (OSError: [Errno 28] No space left on"),
        (ValueError("x" * 5000 + "\nend"), 1, "x end)."),
        (ImportError("No module named 'tensorflow'"), 1, "pip install -r requirements-prepare.txt"),
        (KeyboardInterrupt(), 130, "interrupted; the unfinished files are removed."),
        (None, 1, "the tars hold 24 train images instead of 25"),
    ],
)
def test_a_failure_leaves_nothing(error, status, message, builder, run, tmp_path, monkeypatch):
    builder.error = error
    if error is None:
        monkeypatch.setattr(prepare, "IMAGENET_IMAGES", {"train": 25})
    found, _, err = run()
    assert found == status
    assert message in err
    assert len(err) < 500
    assert os.listdir(tmp_path / "data") == []


def test_a_part_of_imagenet_must_be_allowed(builder, run, tars, monkeypatch):
    monkeypatch.setattr(prepare, "IMAGENET_IMAGES", {"train": 25, "validation": 8})
    os.truncate(tars / TRAIN, 5000)
    status, _, err = run()
    assert (status, builder.calls) == (1, 0)
    assert f"{tars / TRAIN} has 5,000 bytes instead of 20,480" in err
    status, out, _ = run("--allow_incomplete")
    assert status == 0
    assert "train: 24 of ImageNet's 25 images" in out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (TRAIN, None, f"has no {TRAIN}: put {TRAIN} and {VALIDATION} there."),
        (VALIDATION, None, f"has no {VALIDATION}"),
        (VALIDATION, b"<!DOCTYPE html>" * 100, "is damaged ("),
        (VALIDATION, archive(validation(1, 2))[:700], "is damaged ("),
        (VALIDATION, archive({}), "must hold ILSVRC2012_val_00000001.JPEG and so on"),
        (VALIDATION, archive(validation(1, 2, 4)), "without a gap"),
        (VALIDATION, archive(validation(2)), "without a gap"),
    ],
)
def test_unusable_tars_are_refused_before_anything_is_written(name, content, message, builder, run, tars):
    (tars / name).unlink()
    if content is not None:
        (tars / name).write_bytes(content)
    status, _, err = run("--allow_incomplete")
    assert (status, builder.calls) == (1, 0)
    assert message in err
    assert not (tars.parent / "data").exists()


def test_a_small_disk_or_another_preparation_is_named(builder, run, tmp_path, monkeypatch):
    unfinished = tmp_path / "data/.imagenet2012-unfinished"
    unfinished.mkdir(parents=True)
    assert f"{unfinished} exists: another preparation is running, or was killed" in run()[2]
    assert unfinished.exists()
    unfinished.rmdir()
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda _: namedtuple("usage", "free")(12_345))
    monkeypatch.setattr(prepare, "_check_tars", lambda *_: 154_642_401_280)
    assert "data has 0.00 GB free but 157.74 GB are needed" in run()[2]
    assert (os.listdir(tmp_path / "data"), builder.calls) == ([], 0)
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "data").touch()
    assert "Not a directory" in run()[2]


def test_the_command_needs_neither_jax_nor_tensorflow_to_refuse(tars):
    code = (
        f"import sys; from convit_jax.data import prepare; prepare.main(['--tars={tars}', '--output=none']); "
        "sys.exit(str({'jax', 'tensorflow', 'numpy'} & {*sys.modules} or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "bytes instead of 147,897,477,120" in done.stderr
    assert done.stderr.count("\n") == 2  # the second is empty
