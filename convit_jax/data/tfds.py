"""Data sets prepared by TensorFlow Datasets, such as ImageNet, read without TensorFlow.

ArrayRecord files are read through TFDS's `as_data_source`. TFDS cannot read TFRecord files by record number;
`tfrecord.py` does. Both formats hold the same tf.train.Examples and give the same images in the same order.
"""

import contextlib
import json
import os
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.json_format import ParseError
from google.protobuf.message import DecodeError
from tqdm import tqdm

from convit_jax.data.class_names import IMAGENET_IMAGES
from convit_jax.data.index import Arrays, Index, Indexed, cached_index, make_index
from convit_jax.data.tfrecord import Describe, Description, TfRecords, damaged_shard
from convit_jax.errors import UserError, nearest

FILE_NAMES = ("file_name", "filename", "image/filename", "id")  # features that may name the image
SPARE_FILES = 256  # open files that are not shards


class TfdsImages(Indexed):
    """A split of a TFDS data set with one image and one class label per example.

    Args:
      name: of the data set in TFDS: NAME, NAME/CONFIG or NAME:VERSION.
      directory: TFDS's data directory, or the data set's own; None: $TFDS_DATA_DIR or TFDS's default.
      split: "train"; or "test" for the validation split, or the test split if there is no validation split.

    Raises:
      UserError: there is no such data set or split, files are missing or damaged, or the data set does not
        consist of labelled images.
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
        _allow_open_files(len(self.paths))
        file_format = builder.info.file_format.value
        if file_format not in ("array_record", "tfrecord"):
            raise UserError(f"{self.directory} is in the format {file_format}: prepare it as array_record or tfrecord.")
        tfrecord = file_format == "tfrecord"
        self.records = TfRecords(self.paths) if tfrecord else ArrayRecords(builder, info, self.paths)
        try:
            stats = [(os.path.basename(path), os.stat(path)) for path in self.paths]
        except OSError as error:
            raise damaged_shard(error.filename, error) from error
        facts = [(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats]
        self.index = cached_index(self.directory, info.name, facts, lambda: self._list(info))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _allow_open_files(len(self.paths))  # in a loader worker

    def __getitem__(self, number: int) -> bytes:
        features = _parse_example(self.records.read(self.index, number))
        return features[self.image_key].bytes_list.value[0]

    def _list(self, info: Any) -> Index:
        """Builds the index in one pass over all records."""
        print(f"Indexing {info.num_examples:,} images of {self.directory}, {info.name}", file=sys.stderr)
        with tqdm(total=info.num_examples, unit=" images", unit_scale=True, disable=None) as bar:
            described, places = self.records.scan(info.shard_lengths, self._describe, bar.update)
        labels = [label for label, _ in described]
        if min(labels) < 0:
            raise UserError(f"{self.directory} has no labels in {info.name}: use another data set.")
        names = [
            f"{self.class_names[label]}/{f'{number:08d}' if name is None else os.fsdecode(name)}"
            for number, (label, name) in enumerate(described)
        ]
        return make_index(labels, names, **places)

    def _describe(self, features: Any) -> Description:
        label = features[self.label_key].int64_list.value[0]
        return label, features[self.name_key].bytes_list.value[0] if self.name_key else None


class ArrayRecords:
    """The records of a split in ArrayRecord files, found by an index with the array "record"."""

    def __init__(self, builder: Any, info: Any, paths: Sequence[str]) -> None:
        from tensorflow_datasets.core.decode import DeserializeMethod

        self.paths = paths
        self.ends = np.cumsum(info.shard_lengths)  # of the shards, in records
        self.source = builder.as_data_source(info.name, deserialize_method=DeserializeMethod.RAW_BYTES)

    def read(self, index: Index, number: int) -> bytes:
        """Returns the payload of a record; ArrayRecord checks its checksums."""
        record = int(index.arrays["record"][number])
        with self._naming_shard(record):
            payload = self.source[record]
            if not payload:  # what ArrayRecord returns for some truncated records
                raise ValueError("a record is empty")
            return payload

    def scan(
        self, shard_lengths: Sequence[int], describe: Describe, progress: Callable[[int], Any]
    ) -> tuple[list[Description], Arrays]:
        """Lists all records, as TfRecords.scan does; ArrayRecord can only read whole records."""
        described: list[Description] = []
        for end in self.ends:
            while len(described) < end:
                numbers = range(len(described), min(len(described) + 256, end))
                with self._naming_shard(numbers[0]):
                    described += [describe(_parse_example(record)) for record in self.source.__getitems__(numbers)]
                progress(len(numbers))
        return described, {"record": np.arange(sum(shard_lengths))}

    @contextlib.contextmanager
    def _naming_shard(self, record: int) -> Iterator[None]:
        """Turns errors of ArrayRecord into a UserError that names the file."""
        try:
            yield
        except (OSError, ValueError, IndexError, RuntimeError, DecodeError) as error:
            raise damaged_shard(self.paths[int(np.searchsorted(self.ends, record, side="right"))], error) from error


def _parse_example(record: bytes) -> Any:
    """Returns the features {name: Feature} of a tf.train.Example."""
    from tensorflow_datasets.proto import tf_example_pb2

    return tf_example_pb2.Example.FromString(record).features.feature


def _allow_open_files(shards: int) -> None:
    """Raises this process's limit on open files if needed: every shard that is read stays open."""
    needed = shards + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= hard < needed:  # negative: unlimited
        raise UserError(
            f"a data set of {shards:,} shards needs {needed:,} open files, but the limit is "
            f"{hard:,} (ulimit -Hn): raise it, or prepare the data set in fewer shards."
        )
    if 0 <= soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _find_builder(name: str, directory: str | None) -> Any:
    """Returns TFDS's builder of a prepared data set."""
    import tensorflow_datasets as tfds

    given = Path(directory or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    short = name.split(":")[0].split("/")[0]
    try:
        if (given / "features.json").exists():
            return tfds.builder_from_directory(given)
        root = given.parent if given.name == short else given
        return tfds.core.read_only_builder.builder_from_files(name, data_dir=root)
    except (OSError, ParseError, json.JSONDecodeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(
            f"the description of the TFDS data set {name!r} in {given} is missing or damaged ({reason}): "
            "copy dataset_info.json and features.json again."
        ) from error
    except (tfds.core.registered.DatasetNotFoundError, ValueError) as error:
        raise UserError(_not_found(name, short, given)) from error


def _not_found(name: str, short: str, given: Path) -> str:
    """Phrases the message about a data set that does not exist."""
    if (given / "train").is_dir():
        return f"{given} is an image folder, not a TFDS data set: add --config.data.name=folder."
    message = f"there is no TFDS data set {name!r} in {given}: expected {given}/{short}/VERSION/features.json"
    if (guess := nearest(name, {"digits", "folder", "imagenet2012"} - {name})) != ".":
        message = f"data.name is {name!r}{guess} {message}"
    if unfinished := next(given.glob(f"{short}/**/incomplete*"), None):
        message += f"; {unfinished} was never finished"
    if other := next(iter(sorted(given.glob(f"{short}/**/features.json"))), None):
        message += f"; there is {other.parent.relative_to(given)}"
    how = "prepare it with python -m convit_jax.data.prepare, " if short == "imagenet2012" else ""
    folder = "or use an image folder with --config.data.name=folder."
    return f"{message}. Set --config.data.dir to TFDS's directory, {how}{folder}"


def _find_split(builder: Any, split: str) -> Any:
    """Returns TFDS's SplitInfo for our split "train" or "test"."""
    existing = builder.info.splits
    wanted = ("train",) if split == "train" else ("validation", "test")
    for name in wanted:
        if name in existing and existing[name].num_examples:
            return existing[name]
    raise UserError(
        f"{builder.data_dir} has no {' or '.join(wanted)} split, only {', '.join(existing) or 'none'}: use another "
        "data set, or prepare this one again (TFDS leaves out a split if its files are missing)."
    )


def _find_features(builder: Any) -> tuple[str, str, str | None]:
    """Returns the names of the features that hold the image, the label and the file name."""
    from tensorflow_datasets import features as kinds

    features = builder.info.features
    images = [name for name, feature in features.items() if isinstance(feature, kinds.Image)]
    labels = [name for name, feature in features.items() if isinstance(feature, kinds.ClassLabel)]
    supervised = builder.info.supervised_keys
    if len(labels) > 1 and supervised and supervised[1] in labels:  # CIFAR-100 has coarse labels too
        labels = [supervised[1]]
    if len(images) != 1 or len(labels) != 1:
        raise UserError(
            f"{builder.data_dir} has {len(images)} images and {len(labels)} class labels per example: "
            "use a data set with one of each."
        )
    return images[0], labels[0], next((name for name in FILE_NAMES if name in features), None)
