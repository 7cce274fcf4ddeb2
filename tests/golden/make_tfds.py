"""Makes tfds.tar.gz: tiny TFDS directories for the tests, in both file formats, by TFDS's own builders.

    pip install -r requirements-prepare.txt "scikit-learn>=1.7,<2"
    python -m tests.golden.make_tfds

All images are crops of scikit-learn's two sample photos. The archive holds ROOT/{array_record,tfrecord}/ with
    imagenet2012/5.1.0            6 classes of 4, 8 for validation, two shards a split
    imagenette/160px-v2/1.0.0     10 classes of 1, 5 for validation; features image and label only
    cifar10/3.0.2                 20 images, 10 for the test, as PNG; features id, image, label
"""

import gzip
import io
import itertools
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_sample_images

from tests.tars import archive, write_ilsvrc

HERE = Path(__file__).parent
FORMATS = ("array_record", "tfrecord")
# TFDS turns the training images that are CMYK or PNG into RGB JPEGs, by name: one of each kind.
REPAIRED = {"n01739381_1309.JPEG": ("CMYK", "JPEG"), "n02105855_2933.JPEG": ("RGB", "PNG")}
rng = np.random.default_rng(0)


def crop(mode="RGB", kind="JPEG", size=None):
    """Returns an image file: a random part of a sample photo, 24 to 48 pixels wide and high."""
    photo = Image.fromarray(load_sample_images().images[rng.integers(2)])
    width, height = size or rng.integers(24, 49, 2)
    scale = rng.integers(1, 7)
    left, top = rng.integers(photo.width - scale * width + 1), rng.integers(photo.height - scale * height + 1)
    box = (left, top, left + scale * width, top + scale * height)
    file = io.BytesIO()
    photo.resize((width, height), box=box).convert(mode).save(file, kind, quality=60)
    return file.getvalue()


def labels(file):
    """Returns the lines of a list that TFDS contains."""
    return Path(tfds.core.tfds_path(file)).read_text().split()


def imagenet_tars(folder):
    """Writes the two ILSVRC tars: the two classes of REPAIRED and the first four others in validation."""
    of_validation = labels("datasets/imagenet2012/validation_labels.txt")
    wnids = list(dict.fromkeys([name.split("_")[0] for name in REPAIRED] + of_validation))[:6]
    train = {}
    for wnid in sorted(wnids):
        names = [name for name in REPAIRED if name.startswith(wnid)]
        # Numbers are not padded with zeros, so that sorted order is not the order of numbers.
        names += [f"{wnid}_{number}.JPEG" for number in rng.choice(12000, 4 - len(names), replace=False)]
        train.update({name: crop(*REPAIRED.get(name, ("RGB", "JPEG"))) for name in names})
    modes = ["RGB", "L", "RGB", "CMYK", "RGB", "RGB", "RGB", "RGB"]
    write_ilsvrc(folder, train, {f"ILSVRC2012_val_{i:08d}.JPEG": crop(mode) for i, mode in enumerate(modes, 1)})


def imagenette_folder(folder):
    """Writes what the archive of imagenette2-160 unpacks to."""
    wnids = labels("image_classification/imagenette_labels.txt")
    for split, few in (("train", wnids), ("val", wnids[:5])):
        for wnid in few:
            file = folder / "imagenette2-160" / split / wnid / f"{wnid}_{rng.integers(12000)}.JPEG"
            file.parent.mkdir(parents=True)
            file.write_bytes(crop())


def cifar_folder(folder):
    """Writes what CIFAR-10's binary archive unpacks to: label byte, then 3 x 32 x 32 bytes."""
    unpacked = folder / "cifar-10-batches-bin"
    unpacked.mkdir()
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (unpacked / "batches.meta.txt").write_text("\n".join(names))
    digits = itertools.cycle(range(10))
    for file, count in [*((f"data_batch_{i}.bin", 4) for i in range(1, 6)), ("test_batch.bin", 10)]:
        with (unpacked / file).open("wb") as batch:
            for label in itertools.islice(digits, count):
                pixels = np.asarray(Image.open(io.BytesIO(crop(size=(32, 32)))))
                batch.write(bytes([label]) + pixels.transpose(2, 0, 1).tobytes())


def prepare(name, root, raw, file_format, **settings):
    """Runs TFDS's builder on the raw files."""
    config = tfds.download.DownloadConfig(manual_dir=raw, try_download_gcs=False, **settings)
    with mock.patch.object(tfds.download.DownloadManager, "download_and_extract", return_value=raw):
        tfds.builder(name, data_dir=root / file_format).download_and_prepare(
            file_format=file_format, download_config=config
        )


def main():
    with tempfile.TemporaryDirectory() as work:
        raw, root = Path(work, "raw"), Path(work, "tfds")
        raw.mkdir()
        for make in (imagenet_tars, imagenette_folder, cifar_folder):
            make(raw)
        for file_format in FORMATS:
            prepare("imagenet2012", root, raw, file_format, num_shards=2)
            prepare("imagenette/160px-v2", root, raw, file_format)
            prepare("cifar10", root, raw, file_format)
        files = {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
    target = HERE / "tfds.tar.gz"
    target.write_bytes(gzip.compress(archive(files), mtime=0))
    print(f"{target}: {target.stat().st_size} bytes, {len(files)} files")


if __name__ == "__main__":
    main()
