"""Runs the real preparation on miniature tars: make test-prepare (TensorFlow needed, JAX not).

The tars hold the images of golden/tfds.tar.gz; what TFDS makes of them must hold the same records again, in
both file formats; whatever goes wrong in the middle must leave nothing under the data set's name.
"""

import io
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from convit_jax.data.prepare import FORMATS, quiet_tfds
from tests.tars import write_ilsvrc

ROOT = Path(__file__).parents[1]
CMYK, PNG = "n01739381_1309.JPEG", "n02105855_2933.JPEG"  # TFDS turns these two into RGB JPEGs, by name
tfds = quiet_tfds()
# Sorting on disk, which TFDS begins at 1 GB, begins at once; {} is what is done before the start.
PROGRAM = """
import os, signal
import tensorflow_datasets.core.shuffle as shuffle
from convit_jax.data import prepare
from convit_jax.data.tfds_progress import Progress
shuffle.MAX_MEM_BUFFER_SIZE = 4096
kill = lambda *_: os.kill(os.getpid(), signal.{signal})
{patch}
prepare.main()
"""
FULL = """
def full(*_):
    raise OSError(28, os.strerror(28))
Progress._end = full
"""
CUT_OFF = """
build = prepare.build
def cut_off(*arguments):
    directory = build(*arguments)
    file = next(directory.glob("*-train.*"))
    os.truncate(file, file.stat().st_size - 1000)
    return directory
prepare.build = cut_off
"""


def records(directory, split):
    """{file name: (class, bytes of the image)} as TFDS reads a split."""
    builder = tfds.builder_from_directory(directory)
    decoders = {"image": tfds.decode.SkipDecoding()}
    if builder.info.file_format.value == "array_record":
        found = builder.as_data_source(split, decoders=decoders)
    else:
        found = tfds.as_numpy(builder.as_dataset(split=split, decoders=decoders))
    name = builder.info.features["label"].int2str
    return {r["file_name"].decode(): (name(int(r["label"])), bytes(r["image"])) for r in found}


def encoded(mode, kind):
    """A file of 24 x 16 pixels, one colour."""
    file = io.BytesIO()
    Image.new("RGB", (24, 16), (200, 40, 90)).convert(mode).save(file, kind, quality=95)
    return file.getvalue()


def run(tars, output, file_format=None, patch="", by="SIGKILL"):
    """The command in a process of its own: (status, standard output, standard error)."""
    done = subprocess.run(
        [
            *(sys.executable, "-c", PROGRAM.format(patch=patch, signal=by)),
            *(f"--tars={tars}", f"--output={output}", *([f"--format={file_format}"] if file_format else [])),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def prepared_as_expected(work, tars, train, validation):
    """Both formats hold every record; a second start finds them; TFDS and TensorFlow are not heard."""
    for file_format in FORMATS:
        output = work / file_format
        status, out, err = run(tars, output, file_format)
        assert (status, err) == (0, ""), (status, out, err)
        for line in (
            "classes 6, validation images 8",
            "(6 of 1,000 classes)",
            f"1/4 reading train: {len(train)} images",
            "4/4 writing validation: 8 images",
            f"train             {len(train)} images, a part of ImageNet's 1,281,167",
            f"--config.data.dir={output}",
        ):
            assert line in out, (line, out)
        assert len(out.splitlines()) == 13, out
        assert os.listdir(output) == ["imagenet2012"]
        directory = output / "imagenet2012/5.1.0"
        assert records(directory, "validation") == validation
        found = records(directory, "train")
        assert found.keys() == train.keys()
        for name, (wnid, image) in found.items():
            assert wnid == train[name][0]
            if name in (CMYK, PNG):
                mended = Image.open(io.BytesIO(image))
                assert (mended.mode, mended.format, mended.size) == ("RGB", "JPEG", (24, 16))
                off = np.abs(np.asarray(mended, int) - (200, 40, 90))
                assert off.max() <= 8, (name, off.max())
            else:
                assert image == train[name][1], name
        status, out, err = run(tars, output)
        assert status == 0, err
        assert f"is there already, as {file_format}" in out


def killed_without_a_trace(work, tars):
    """Killed while it writes, or when TFDS is done but nothing is checked: the next start cleans up."""
    output = work / "killed"
    for patch in ("Progress._end = kill", "prepare.check = kill"):
        status, out, err = run(tars, output, patch=patch)
        assert status == -signal.SIGKILL, (status, out, err)
        assert os.listdir(output) == [".imagenet2012-unfinished"]
    status, out, err = run(tars, output, patch="prepare.check = kill", by="SIGTERM")
    assert status == 130, (status, err)
    assert "Removing what an interrupted preparation left" in out
    assert err == "prepare: interrupted; what was written has been removed.\n"
    assert os.listdir(output) == []
    status, out, err = run(tars, output)
    assert status == 0, err
    assert os.listdir(output) == ["imagenet2012"]


def refused(work, tars, sentence, patch="", file_format=None):
    """One sentence, and nothing is left."""
    output = work / "refused"
    status, out, err = run(tars, output, file_format, patch)
    assert status == 1, (status, out, err)
    assert err.count("\n") == 1, err
    assert sentence in err, err
    assert not output.exists() or os.listdir(output) == []


def main():
    since = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        with tarfile.open(ROOT / "tests/golden/tfds.tar.gz") as archive:
            archive.extractall(work / "golden", filter="data")
        golden = work / "golden/array_record/imagenet2012/5.1.0"
        train, validation = records(golden, "train"), records(golden, "validation")
        train[CMYK] = train[CMYK][0], encoded("CMYK", "JPEG")
        train[PNG] = train[PNG][0], encoded("RGB", "PNG")
        tars = work / "tars"
        tars.mkdir()
        files = {name: image for name, (_, image) in train.items()}
        validation_files = {name: image for name, (_, image) in validation.items()}
        write_ilsvrc(tars, files, validation_files)
        prepared_as_expected(work, tars, train, validation)
        killed_without_a_trace(work, tars)
        refused(work, tars, "is full (at 1/4 reading train after 24 images): make room", FULL)
        for file_format, said in (("array_record", "cannot be read back"), ("tfrecord", "bytes, not")):
            refused(work, tars, said, CUT_OFF, file_format)
        write_ilsvrc(tars, {**files, "n99999999_1.JPEG": b""}, validation_files)
        refused(work, tars, "n99999999.tar, no class of ImageNet's 1,000")
        write_ilsvrc(tars, dict.fromkeys(files.keys() - {CMYK, PNG}, b"no image"), validation_files)
        refused(work, tars, "does not decode")
        (tars / "ILSVRC2012_img_train.tar").unlink()
        refused(work, tars, "has no ILSVRC2012_img_train.tar")
    print(f"test-prepare: all as expected, in {time.monotonic() - since:.0f} s")


if __name__ == "__main__":
    main()
