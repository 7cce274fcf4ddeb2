"""Data sets prepared by TensorFlow Datasets, such as ImageNet, read without TensorFlow.

ArrayRecord and TFRecord files hold the same tf.train.Examples and give the same images in the same order.
"""

import functools
import itertools
import os
import re
import resource
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from tqdm import tqdm

from convit_jax.data.class_names import IMAGENET_IMAGES
from convit_jax.data.index import Index, Source, cached_index, make_index
from convit_jax.data.tfrecord import read_record, scan
from convit_jax.errors import UserError, explained, nearest

FILE_NAMES = ("file_name", "filename", "image/filename", "id")  # features that may name the image
KNOWN = {"digits", "folder", "imagenet2012"}  # values of data.name

_array_records = functools.cache(ArrayRecordDataSource)  # of a path; the file stays open


class TfdsImages(Source):
    """A split of a TFDS data set, NAME, NAME/CONFIG or NAME:VERSION, with one image and one class label per example.

    directory is TFDS's or the data set's own, by default $TFDS_DATA_DIR. Split "test" is TFDS's validation, if any.
    """

    def __init__(self, name: str, directory: str | None, split: str) -> None:
        builder = _find_builder(name, directory)
        info = _find_split(builder, split)
        self.directory = Path(builder.data_dir)
        self.image_key, self.label_key, self.name_key = _find_features(builder)
        self.class_names = tuple(builder.info.features[self.label_key].names)
        self.paths = [str(path) for path in info.filepaths]
        expected = IMAGENET_IMAGES.get(info.name) if builder.name == "imagenet2012" else None
        if expected not in (None, info.num_examples):
            print(
                f"Warning: {self.directory} has {info.num_examples:,} images in {info.name}; "
                f"ImageNet has {expected:,}.",
                file=sys.stderr,
            )
        file_format = builder.info.file_format.value
        if file_format not in ("array_record", "tfrecord"):
            raise UserError(f"{self.directory} is in the format {file_format}: prepare it as array_record or tfrecord.")
        self.tfrecord = file_format == "tfrecord"
        _allow_open_files(len(self.paths))
        facts = []
        for path in self.paths:
            with explained(path):
                stat = os.stat(path)
            facts.append((os.path.basename(path), stat.st_size, stat.st_mtime_ns))
        self.index = cached_index(self.directory, info.name, facts, lambda: self._list(info))

    def __getitem__(self, number: int) -> bytes:
        shard, position = (int(self.index.table[name][number]) for name in ("shard", "position"))
        path = self.paths[shard]
        with explained(path):
            record = read_record(path, position) if self.tfrecord else _array_records(path)[position]
            return _parse(record)[self.image_key].bytes_list.value[0]

    def _list(self, info: Any) -> Index:
        """Builds the index in one pass over all records."""
        print(f"Indexing {info.num_examples:,} images of {self.directory}, {info.name}", file=sys.stderr)
        with ThreadPoolExecutor(16) as pool:  # several reads at once, for network and parallel disks
            shards = pool.map(self._list_shard, self.paths, info.shard_lengths)
            progress = tqdm(shards, "Indexing", len(self.paths), unit=" shards", disable=None)
            positions, labels, names = zip(*itertools.chain.from_iterable(progress), strict=True)
        if min(labels) < 0:
            raise UserError(f"{self.directory} has no labels in {info.name}: use another data set.")
        unique = [
            f"{self.class_names[label]}/{f'{number:08d}' if name is None else os.fsdecode(name)}"
            for number, (label, name) in enumerate(zip(labels, names, strict=True))
        ]
        shard = np.repeat(np.arange(len(self.paths), dtype=np.int32), info.shard_lengths)
        return make_index(labels, unique, shard=shard, position=np.array(positions))

    def _list_shard(self, path: str, expected: int) -> list[tuple[int, int, bytes | None]]:
        """Returns the position, label and file name of each record."""
        found = []
        with explained(path):
            for position, record in scan(path) if self.tfrecord else enumerate(ArrayRecordDataSource(path)):
                features = _parse(record)
                label = features[self.label_key].int64_list.value[0]
                name = features[self.name_key].bytes_list.value[0] if self.name_key else None
                found.append((position, label, name))
            if len(found) != expected:
                raise ValueError(f"{len(found)} records instead of the {expected} in dataset_info.json")
        return found


def _parse(record: bytes) -> Any:
    """Returns the features {name: Feature} of a tf.train.Example."""
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2.Example.FromString(record).features.feature


def _allow_open_files(shards: int) -> None:
    """Raises the limit on open files for this process and its loader workers: every shard stays open."""
    needed = shards + 256
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < needed:  # negative: unlimited
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed if hard < 0 else min(needed, hard), hard))


def _find_builder(name: str, directory: str | None) -> Any:
    """Returns TFDS's builder of a prepared data set."""
    import tensorflow_datasets as tfds

    given = Path(directory or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    short = name.split(":")[0].split("/")[0]
    if not re.fullmatch(r"\w+", short):
        raise UserError(f"data.name is {name!r}, which names no data set: a path belongs in --config.data.dir.")
    try:
        if (given / "features.json").exists():
            return tfds.builder_from_directory(given)
        root = given.parent if given.name == short else given
        return tfds.core.read_only_builder.builder_from_files(name, data_dir=root)
    except Exception as error:  # TFDS raises all kinds for damaged files
        reason = str(error).partition("\n")[0].split(". ")[0].rstrip(".") or type(error).__name__
        found = sorted(str(path.parent.relative_to(given)) for path in given.glob(f"{short}/**/features.json"))
        raise UserError(
            f"cannot open the TFDS data set {name!r} ({reason}){nearest(name, KNOWN - {name})} Expected "
            f"{given}/{short}/VERSION/features.json, found {', '.join(found) or 'none'}. Set --config.data.dir, "
            "prepare the data set again (ImageNet: python -m convit_jax.data.prepare), or use an image folder with "
            "--config.data.name=folder."
        ) from error


def _find_split(builder: Any, split: str) -> Any:
    """Returns TFDS's SplitInfo for our split "train" or "test"."""
    existing = builder.info.splits
    wanted = ("train",) if split == "train" else ("validation", "test")
    for name in wanted:
        if name in existing and existing[name].num_examples:
            return existing[name]
    raise UserError(
        f"{builder.data_dir} has no {' or '.join(wanted)} split, only {[*existing]}: prepare it again, or use a "
        "data set that has both."
    )


def _find_features(builder: Any) -> tuple[str, str, str | None]:
    """Returns the names of the features that hold the image, the label and the file name."""
    from tensorflow_datasets import features as kinds

    features = builder.info.features
    supervised = builder.info.supervised_keys or ()  # CIFAR-100 has coarse labels too, Oxford's pets have masks

    def of_kind(kind: type) -> list[str]:
        found = [name for name, feature in features.items() if isinstance(feature, kind)]
        return [name for name in found if name in supervised] or found

    images, labels = of_kind(kinds.Image), of_kind(kinds.ClassLabel)
    if len(images) != 1 or len(labels) != 1:
        raise UserError(
            f"{builder.data_dir} has {len(images)} images and {len(labels)} class labels per example: "
            "use a data set with one of each."
        )
    texts = [name for name in FILE_NAMES if name in features and np.dtype(features[name].np_dtype).kind in "OSU"]
    return images[0], labels[0], next(iter(texts), None)
