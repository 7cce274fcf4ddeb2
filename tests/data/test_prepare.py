"""What preparing ImageNet refuses; what it makes is checked with TensorFlow in tests/prepare_for_real.py."""

import pytest
import tensorflow_datasets
from conftest import run_python

from convit_jax.data import prepare
from tests.tars import archive, write_ilsvrc

TRAIN, VALIDATION = prepare.TARS


def validation(*numbers):
    return {f"ILSVRC2012_val_{number:08d}.JPEG": b"image" for number in numbers}


@pytest.fixture
def tars(tmp_path, monkeypatch):
    """A folder with tars of the expected sizes."""
    folder = tmp_path / "tars"
    folder.mkdir()
    write_ilsvrc(folder, {"n01440764_18.JPEG": b"image"}, validation(1, 2, 3))
    monkeypatch.setattr(prepare, "TARS", {name: (folder / name).stat().st_size for name in (TRAIN, VALIDATION)})
    monkeypatch.setattr(prepare.signal, "signal", lambda *_: None)
    return folder


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), "prepare: [Errno 28] No space left on device"),
        (KeyboardInterrupt(), "prepare: interrupted."),
        (ImportError("No module named 'tensorflow'"), "pip install -r requirements-prepare.txt"),
    ],
)
def test_a_full_disk_ctrl_c_and_missing_tensorflow_are_one_line(error, message, tars, monkeypatch, capsys):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(tensorflow_datasets, "builder", fail)
    assert prepare.main([f"--tars={tars}", f"--output={tars}"]) == (130 if isinstance(error, KeyboardInterrupt) else 1)
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (TRAIN, None, f"{TRAIN}'"),
        (VALIDATION, b"<!DOCTYPE html>" * 100, "without a gap"),
        (VALIDATION, archive(validation(1, 2))[:700], "without a gap"),
        (VALIDATION, archive({}), "must hold ILSVRC2012_val_00000001.JPEG and so on"),
        (VALIDATION, archive(validation(1, 2, 4)), "without a gap"),
    ],
)
def test_unusable_tars_are_refused_before_anything_is_written(name, content, message, tars, capsys):
    (tars / name).unlink()
    if content is not None:
        (tars / name).write_bytes(content)
    assert prepare.main([f"--tars={tars}", f"--output={tars}/data", "--allow_incomplete"]) == 1
    assert message in capsys.readouterr().err
    assert not (tars / "data").exists()


def test_the_command_needs_neither_jax_nor_tensorflow_to_refuse(tars):
    code = (
        f"import sys; from convit_jax.data import prepare; prepare.main(['--tars={tars}', '--output=none']); "
        "sys.exit(str({'jax', 'tensorflow', 'numpy'} & {*sys.modules} or ''))"
    )
    done = run_python("-c", code)
    assert "bytes instead of 147,897,477,120" in done.stderr
    assert done.stderr.count("\n") == 2  # the second is empty
