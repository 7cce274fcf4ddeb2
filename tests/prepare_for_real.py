"""Runs the real preparation on miniature tars: make test-prepare (needs TensorFlow, but not JAX).

The tars hold the images of golden/tfds.tar.gz; TFDS must make the same records from them again.
"""

import io
import os
import tarfile
import tempfile
from pathlib import Path
from unittest import mock

import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core import shuffle

from convit_jax.data import prepare
from tests.tars import write_ilsvrc

GOLDEN = Path(__file__).parent / "golden/tfds.tar.gz"
TRAIN, VALIDATION = prepare.TARS
CMYK, PNG = "n01739381_1309.JPEG", "n02105855_2933.JPEG"  # TFDS turns these two into RGB JPEGs, by name


def records(directory, split):
    """Returns {file name: (class, bytes of the image)} as TFDS reads a split."""
    builder = tfds.builder_from_directory(directory)
    decoders = {"image": tfds.decode.SkipDecoding()}
    if builder.info.file_format.value == "array_record":
        found = builder.as_data_source(split, decoders=decoders)
    else:
        found = tfds.as_numpy(builder.as_dataset(split=split, decoders=decoders))
    name = builder.info.features["label"].int2str
    return {r["file_name"].decode(): (name(int(r["label"])), bytes(r["image"])) for r in found}


def encoded(mode, kind):
    """Returns an image file of one colour."""
    file = io.BytesIO()
    Image.new("RGB", (24, 16), (200, 40, 90)).convert(mode).save(file, kind, quality=95)
    return file.getvalue()


def run(tars, output, *arguments):
    """Runs the command and returns its exit status."""
    return prepare.main([f"--tars={tars}", f"--output={output}", *arguments])


def main():
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(shuffle, "MAX_MEM_BUFFER_SIZE", 4096):
        work = Path(folder)  # with this limit TFDS sorts on disk, as it does from 1 GB on
        with tarfile.open(GOLDEN) as archive:
            archive.extractall(work / "golden", filter="data")
        golden = work / "golden/array_record/imagenet2012/5.1.0"
        train, validation = records(golden, "train"), records(golden, "validation")
        files = {name: image for name, (_, image) in train.items()}
        files |= {CMYK: encoded("CMYK", "JPEG"), PNG: encoded("RGB", "PNG")}
        tars = work / "tars"
        tars.mkdir()
        write_ilsvrc(tars, files, {name: image for name, (_, image) in validation.items()})

        for file_format in ("array_record", "tfrecord"):
            output = work / file_format
            assert run(tars, output, f"--format={file_format}", "--allow_incomplete") == 0
            assert run(tars, output, f"--format={file_format}", "--allow_incomplete") == 1  # it exists already
            assert os.listdir(output) == ["imagenet2012"]
            made = output / "imagenet2012/5.1.0"
            assert records(made, "validation") == validation
            found = records(made, "train")
            for name in (CMYK, PNG):
                assert found.pop(name)[0] == train[name][0]
            assert found == {name: record for name, record in train.items() if name not in (CMYK, PNG)}

        # TFDS takes a truncated tar for a smaller one: the size is wrong, and so is the number of images.
        assert run(tars, work / "refused") == 1
        os.truncate(tars / TRAIN, 512 + 10240 + 512 + 10240)  # two of six classes
        with mock.patch.dict(prepare.TARS, {name: (tars / name).stat().st_size for name in prepare.TARS}):
            assert run(tars, work / "refused") == 1
        assert not list(work.glob("refused/*/*"))
    print("test-prepare: all as expected")


if __name__ == "__main__":
    main()
