"""Image classification sets prepared by TensorFlow Datasets, ImageNet above all, without TensorFlow.

ArrayRecord directories are read through TFDS's own `as_data_source`; TFRecord directories, which TFDS
refuses to read by index, through `tfrecord.py`. Both formats hold the same tf.train.Examples, and
give the same images in the same order.
"""

import contextlib
import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from convit_jax.data import open_files
from convit_jax.data.index import Indexed, cached_index, make_index
from convit_jax.data.tfrecord import TfRecords
from convit_jax.errors import UserError, nearest

FILE_NAMES = (
    "file_name",
    "filename",
    "image/filename",
    "id",
)  # features that name the image, if there is one
HELD_OUT = ("validation", "test")  # the split for the test is the first that there is
PREPARE = "python -m convit_jax.data.prepare"
SPARE_FILES = 256  # open files that are not shards


class TfdsImages(Indexed):
    """A split of a TFDS data set with one image and one class label an example, in the order (label, name).

    Args:
      name: as TFDS has it: NAME, NAME/CONFIG, NAME:VERSION.
      directory: TFDS's data directory, or the data set's own; None: $TFDS_DATA_DIR or TFDS's default.
      split: "train", or "test" for the validation split, or the test split where there is none.

    Raises:
      UserError: no such data set, one without the split, one whose files are missing or damaged, or one that
        is not of images with a label.
    """

    def __init__(self, name, directory, split):
        builder = _find(name, directory)
        info = _split(builder, split)
        self.directory = Path(builder.data_dir)
        self.image_key, label_key, name_key = _keys(builder)
        self.class_names = tuple(builder.info.features[label_key].names)
        self.paths = [str(path) for path in info.filepaths]
        self._allow_open_files()
        fingerprint = _fingerprint(self.paths)
        file_format = builder.info.file_format.value
        if file_format == "tfrecord":
            self.records = TfRecords(self.paths)
        elif file_format == "array_record":
            self.records = ArrayRecords(builder, info, self.paths)
        else:
            raise UserError(
                f"{self.directory} is in the format {file_format}: prepare it as array_record or tfrecord."
            )

        def describe(features):
            label = features[label_key].int64_list.value[0]
            return label, features[name_key].bytes_list.value[0] if name_key else None

        def build():
            print(f"Indexing {info.num_examples:,} images of {self.directory}, {info.name}", file=sys.stderr)
            with tqdm(total=info.num_examples, unit=" images", unit_scale=True, disable=None) as bar:
                described, arrays = self.records.scan(info.shard_lengths, describe, bar.update)
            labels, names = np.empty(info.num_examples, np.int32), []
            for number, (label, name) in enumerate(described):
                if label < 0:
                    raise UserError(f"{self.directory} has no labels in {info.name}: it cannot be used.")
                labels[number] = label
                file = f"{number:08d}" if name is None else name.decode()
                names.append(f"{self.class_names[label]}/{file}")
            return make_index(labels, names, **arrays)

        self.index = cached_index(self.directory, info.name, fingerprint, build)

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._allow_open_files()  # of this process, a loader's worker

    def _allow_open_files(self):
        """Every shard that is read stays open."""
        shards = len(self.paths)
        fewer = " or prepare the data set in fewer shards"
        open_files.allow(shards + SPARE_FILES, f"a data set of {shards:,} shards", fewer)

    def __getitem__(self, number):
        features = parse(self.records.read(self.index, number))
        return features[self.image_key].bytes_list.value[0]


class ArrayRecords:
    """The records of a split in ArrayRecord files, found by an index with the array record."""

    def __init__(self, builder, info, paths):
        from tensorflow_datasets.core.decode import DeserializeMethod

        self.paths, self.ends = paths, np.cumsum(info.shard_lengths)  # of shards, in records
        self.source = builder.as_data_source(info.name, deserialize_method=DeserializeMethod.RAW_BYTES)

    def read(self, index, number):
        """The payload of a record, whose sums ArrayRecord checks."""
        record = int(index["record"][number])
        with self._damage(record):
            payload = self.source[record]
            if not payload:  # what ArrayRecord gives for some that are cut off
                raise ValueError("a record is empty")
            return payload

    def scan(self, shard_lengths, describe, progress):
        """Pass over all records, as TfRecords.scan; ArrayRecord can only read them whole."""
        described, at_once = [], 256
        for end in self.ends:
            while len(described) < end:
                numbers = range(len(described), min(len(described) + at_once, end))
                with self._damage(numbers[0]):
                    described += [describe(parse(record)) for record in self.source.__getitems__(numbers)]
                progress(len(numbers))
        return described, {"record": np.arange(sum(shard_lengths))}

    @contextlib.contextmanager
    def _damage(self, record):
        """Name the shard of a record that ArrayRecord cannot read."""
        try:
            yield
        except (OSError, ValueError, IndexError, RuntimeError) as error:
            shard = self.paths[int(np.searchsorted(self.ends, record, side="right"))]
            reason = str(error).split(";")[0].strip()
            raise UserError(f"the shard {shard} is damaged or cut off ({reason}): copy it anew.") from error


def parse(record):
    """The features of a tf.train.Example, {name: Feature}; ValueError if the record is none."""
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_example_pb2

    try:
        return tf_example_pb2.Example.FromString(record).features.feature
    except DecodeError as error:
        raise ValueError("a record is no tf.train.Example") from error


def _find(name, directory):
    """TFDS's builder of a prepared data set."""
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
            "copy dataset_info.json and features.json anew."
        ) from error
    except (DatasetNotFoundError, ValueError) as error:
        raise UserError(_not_found(name, short, given, directory)) from error


def _not_found(name, short, given, directory):
    """The sentence for a data set that is not where it is looked for."""
    if (given / "train").is_dir():
        return f"{given} is an image folder, not a TFDS data set: add --config.data.name=folder."
    known = nearest(name, {"digits", "folder", "imagenet2012"} - {name})
    mistyped = "" if known == "." else f"data.name is {name!r}{known} "
    where = "" if directory else " ($TFDS_DATA_DIR)" if "TFDS_DATA_DIR" in os.environ else " (the default)"
    unfinished = next(given.glob(f"{short}/**/incomplete*"), None) if given.is_dir() else None
    ending = f"; {unfinished} was never finished" if unfinished else ""
    others = sorted(str(path.parent.relative_to(given)) for path in given.glob(f"{short}/**/features.json"))
    ending += f"; there is {others[0]}" if others else ""
    how = f"prepare it with {PREPARE}, " if short == "imagenet2012" else ""
    return (
        f"{mistyped}there is no TFDS data set {name!r} in {given}{where}: expected "
        f"{given}/{short}/VERSION/features.json{ending}. Set --config.data.dir to TFDS's directory, {how}"
        "or use an image folder with --config.data.name=folder."
    )


def _split(builder, split):
    """The SplitInfo of our split "train" or "test"."""
    there = builder.info.splits
    wanted = ("train",) if split == "train" else HELD_OUT
    found = next((name for name in wanted if name in there and there[name].num_examples), None)
    if found is None:
        why = (
            f"TFDS prepares such a directory when the training tar is missing; run {PREPARE} with both tars."
            if split == "train"
            else "it cannot be evaluated on."
        )
        raise UserError(
            f"{builder.data_dir} has no {' or '.join(wanted)} split, only {', '.join(there) or 'none'}: {why}"
        )
    return there[found]


def _keys(builder):
    """The names of the features image, label and file name (None if there is none)."""
    from tensorflow_datasets import features as kinds

    features = builder.info.features
    image, label = (
        [name for name, feature in features.items() if isinstance(feature, kind)]
        for kind in (kinds.Image, kinds.ClassLabel)
    )
    meant = builder.info.supervised_keys
    if len(label) > 1 and meant and meant[1] in label:  # as CIFAR-100, which has coarse ones too
        label = [meant[1]]
    if len(image) != 1 or len(label) != 1:
        raise UserError(
            f"{builder.data_dir} has {len(image)} images and {len(label)} class labels an example: "
            "only data sets with one of each can be used."
        )
    return image[0], label[0], next((name for name in FILE_NAMES if name in features), None)


def _fingerprint(paths):
    """A digest of the names, sizes and times of the shards."""
    try:
        stats = [(os.path.basename(path), os.stat(path)) for path in paths]
    except OSError as error:
        raise UserError(
            f"the shard {error.filename} cannot be found: copy it, or prepare the data set anew."
        ) from error
    facts = json.dumps([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
    return hashlib.sha256(facts.encode()).hexdigest()
