"""Data sets prepared by TensorFlow Datasets, such as ImageNet, read without TensorFlow.

ArrayRecord files are read through TFDS's `as_data_source`. TFDS cannot read TFRecord files by record number;
`tfrecord.py` does. Both formats hold the same tf.train.Examples and give the same images in the same order.
"""

import contextlib
import hashlib
import json
import os
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from convit_jax.data.class_names import IMAGENET_IMAGES
from convit_jax.data.index import Index, Indexed, cached_index, make_index
from convit_jax.data.tfrecord import Describe, Description, TfRecords
from convit_jax.errors import UserError, nearest

FILE_NAMES = ("file_name", "filename", "image/filename", "id")  # features that may name the image
HELD_OUT = ("validation", "test")  # the first that exists is the test split
PREPARE = "python -m convit_jax.data.prepare"
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
        self.image_key, label_key, name_key = _find_features(builder)
        self.class_names = tuple(builder.info.features[label_key].names)
        self.paths = [str(path) for path in info.filepaths]
        expected = IMAGENET_IMAGES.get(info.name) if builder.name == "imagenet2012" else None
        if expected not in (None, info.num_examples):
            print(
                f"Warning: {self.directory} has {info.num_examples:,} images in {info.name}; "
                f"ImageNet has {expected:,}.",
                file=sys.stderr,
            )
        self._allow_open_files()
        file_format = builder.info.file_format.value
        self.records: TfRecords | ArrayRecords
        if file_format == "tfrecord":
            self.records = TfRecords(self.paths)
        elif file_format == "array_record":
            self.records = ArrayRecords(builder, info, self.paths)
        else:
            raise UserError(f"{self.directory} is in the format {file_format}: prepare it as array_record or tfrecord.")

        def describe(features: Any) -> Description:
            label = features[label_key].int64_list.value[0]
            return label, features[name_key].bytes_list.value[0] if name_key else None

        self.index = cached_index(
            self.directory, info.name, _fingerprint(self.paths), lambda: self._list(info, describe)
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._allow_open_files()  # in a loader worker

    def __getitem__(self, number: int) -> bytes:
        features = _parse_example(self.records.read(self.index, number))
        return features[self.image_key].bytes_list.value[0]

    def _list(self, info: Any, describe: Describe) -> Index:
        """Builds the index in one pass over all records."""
        print(f"Indexing {info.num_examples:,} images of {self.directory}, {info.name}", file=sys.stderr)
        with tqdm(total=info.num_examples, unit=" images", unit_scale=True, disable=None) as bar:
            described, arrays = self.records.scan(info.shard_lengths, describe, bar.update)
        labels = [label for label, _ in described]
        if min(labels) < 0:
            raise UserError(f"{self.directory} has no labels in {info.name}: use another data set.")
        names = [
            f"{self.class_names[label]}/{f'{number:08d}' if name is None else os.fsdecode(name)}"
            for number, (label, name) in enumerate(described)
        ]
        return make_index(labels, names, **arrays)

    def _allow_open_files(self) -> None:
        """Raises this process's limit on open files if needed: every shard that is read stays open."""
        needed = len(self.paths) + SPARE_FILES
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft == resource.RLIM_INFINITY or soft >= needed:
            return
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise UserError(
                f"a data set of {len(self.paths):,} shards needs {needed:,} open files, but the limit is "
                f"{hard:,} (ulimit -Hn): raise it, or prepare the data set in fewer shards."
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


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
    ) -> tuple[list[Description], dict[str, np.ndarray]]:
        """Lists all records, as TfRecords.scan does; ArrayRecord can only read whole records."""
        described: list[Description] = []
        for end in self.ends:
            while len(described) < end:
                numbers = range(len(described), min(len(described) + 256, end))
                with self._naming_shard(numbers[0]):
                    records = self.source.__getitems__(numbers)
                    described += [describe(_parse_example(record)) for record in records]
                progress(len(numbers))
        return described, {"record": np.arange(sum(shard_lengths))}

    @contextlib.contextmanager
    def _naming_shard(self, record: int) -> Iterator[None]:
        """Turns errors of ArrayRecord into a UserError that names the file."""
        try:
            yield
        except (OSError, ValueError, IndexError, RuntimeError) as error:
            shard = self.paths[int(np.searchsorted(self.ends, record, side="right"))]
            reason = str(error).split(";")[0].strip()
            raise UserError(f"the shard {shard} is damaged or truncated ({reason}): copy it again.") from error


def _parse_example(record: bytes) -> Any:
    """Returns the features {name: Feature} of a tf.train.Example; raises ValueError if it is not one."""
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_pb2

    try:
        return tf_example_pb2.Example.FromString(record).features.feature
    except DecodeError as error:
        raise ValueError("a record is no tf.train.Example") from error


def _find_builder(name: str, directory: str | None) -> Any:
    """Returns TFDS's builder of a prepared data set."""
    import tensorflow_datasets as tfds
    from google.protobuf.json_format import ParseError
    from tensorflow_datasets.core.registered import DatasetNotFoundError

    given = Path(directory or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    short = name.split(":")[0].split("/")[0]
    root = given.parent if given.name == short else given
    try:
        if (given / "features.json").exists():
            return tfds.builder_from_directory(given)
        return tfds.core.read_only_builder.builder_from_files(name, data_dir=root)
    except (OSError, ParseError, json.JSONDecodeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(
            f"the description of the TFDS data set {name!r} in {given} is missing or damaged ({reason}): "
            "copy dataset_info.json and features.json again."
        ) from error
    except (DatasetNotFoundError, ValueError) as error:
        raise UserError(_not_found(name, short, given)) from error


def _not_found(name: str, short: str, given: Path) -> str:
    """Phrases the message about a data set that does not exist."""
    if (given / "train").is_dir():
        return f"{given} is an image folder, not a TFDS data set: add --config.data.name=folder."
    known = nearest(name, {"digits", "folder", "imagenet2012"} - {name})
    mistyped = "" if known == "." else f"data.name is {name!r}{known} "
    found = ""
    if unfinished := next(given.glob(f"{short}/**/incomplete*"), None):
        found += f"; {unfinished} was never finished"
    if others := sorted(given.glob(f"{short}/**/features.json")):
        found += f"; there is {others[0].parent.relative_to(given)}"
    how = f"prepare it with {PREPARE}, " if short == "imagenet2012" else ""
    return (
        f"{mistyped}there is no TFDS data set {name!r} in {given}: expected "
        f"{given}/{short}/VERSION/features.json{found}. Set --config.data.dir to TFDS's directory, {how}"
        "or use an image folder with --config.data.name=folder."
    )


def _find_split(builder: Any, split: str) -> Any:
    """Returns TFDS's SplitInfo for our split "train" or "test"."""
    existing = builder.info.splits
    wanted = ("train",) if split == "train" else HELD_OUT
    for name in wanted:
        if name in existing and existing[name].num_examples:
            return existing[name]
    remedy = (
        f"TFDS leaves it out if the training tar is missing; run {PREPARE} with both tars."
        if split == "train"
        else "use a data set with a held-out split."
    )
    only = ", ".join(existing) or "none"
    raise UserError(f"{builder.data_dir} has no {' or '.join(wanted)} split, only {only}: {remedy}")


def _find_features(builder: Any) -> tuple[str, str, str | None]:
    """Returns the names of the features that hold the image, the label and the file name."""
    from tensorflow_datasets import features as kinds

    features = builder.info.features
    images, labels = (
        [name for name, feature in features.items() if isinstance(feature, kind)]
        for kind in (kinds.Image, kinds.ClassLabel)
    )
    supervised = builder.info.supervised_keys
    if len(labels) > 1 and supervised and supervised[1] in labels:  # CIFAR-100 has coarse labels too
        labels = [supervised[1]]
    if len(images) != 1 or len(labels) != 1:
        raise UserError(
            f"{builder.data_dir} has {len(images)} images and {len(labels)} class labels per example: "
            "use a data set with one of each."
        )
    return images[0], labels[0], next((name for name in FILE_NAMES if name in features), None)


def _fingerprint(paths: Sequence[str]) -> str:
    """Returns a digest of the names, sizes and times of the shards."""
    try:
        stats = [(os.path.basename(path), os.stat(path)) for path in paths]
    except OSError as error:
        raise UserError(
            f"the shard {error.filename} is missing: copy it again, or prepare the data set again."
        ) from error
    facts = json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
    return hashlib.sha256(facts.encode()).hexdigest()
