"""TFDS directories made by TFDS's own builders, in both formats: the same images; what is said of damage."""

import io
import json
import os
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from convit_jax.data import open_files
from convit_jax.data.examples import EvalExample, Slots, TrainExample
from convit_jax.data.loader import batches
from convit_jax.data.sources import ImageFolder, open_source
from convit_jax.data.subsample import select
from convit_jax.data.tfds import TfdsImages
from convit_jax.errors import UserError

FORMATS = ("array_record", "tfrecord")
IMAGENET = "imagenet2012/5.1.0"


@pytest.fixture(params=FORMATS)
def root(request, tfds_data):
    """A TFDS data directory."""
    return tfds_data / request.param


def shard(root, number=1):
    return next((root / IMAGENET).glob(f"imagenet2012-train.*-{number:05d}-of-00002"))


def as_folder(source, split, folder):
    """The image folder in torchvision's layout with the images of a source."""
    for number, name in enumerate(source.names):
        path = folder / split / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source[number])


def collect(example, **settings):
    return [{k: np.array(v) for k, v in batch.items()} for batch in batches(example, **settings)]


@pytest.mark.parametrize(
    ("name", "split", "images", "classes", "first"),
    [
        ("imagenet2012", "train", 24, 1000, "n01739381/n01739381_"),
        ("imagenet2012", "test", 8, 1000, None),
        ("imagenette/160px-v2", "train", 10, 10, None),
        ("imagenette/160px-v2", "test", 5, 10, None),
        ("cifar10", "train", 20, 10, "airplane/train_0"),
        ("cifar10:3.0.2", "test", 10, 10, None),
    ],
)
def test_a_data_set_is_read_alike_in_both_formats_and_in_order_of_label_and_name(
    name, split, images, classes, first, tfds_data
):
    one, other = (TfdsImages(name, tfds_data / kind, split) for kind in FORMATS)
    assert len(one) == len(other) == images
    assert len(one.class_names) == classes
    keys = list(zip(one.labels.tolist(), one.names, strict=True))
    assert keys == sorted(keys)
    assert keys == list(zip(other.labels.tolist(), other.names, strict=True))
    assert all(one[number] == other[number] for number in range(images))
    assert all(name.split("/")[0] == one.class_names[label] for label, name in keys)
    assert one.names[0].startswith(first or "")
    assert one.labels.dtype == np.int32


def test_records_are_the_files_that_went_in_grey_and_cmyk_too(root):
    source = TfdsImages("imagenet2012", root, "test")
    assert source.names[-1].split("/")[1].startswith("ILSVRC2012_val_0000000")
    modes = {Image.open(io.BytesIO(source[number])).mode for number in range(8)}
    assert modes == {"RGB", "L", "CMYK"}


def test_data_dir_may_be_the_root_the_data_set_or_its_version_and_tfds_data_dir_is_the_default(
    root, monkeypatch
):
    expected = list(TfdsImages("imagenet2012", root, "train").names)
    for directory in (root / "imagenet2012", root / IMAGENET):
        assert list(TfdsImages("imagenet2012", str(directory), "train").names) == expected
    monkeypatch.setenv("TFDS_DATA_DIR", str(root))
    source = open_source(SimpleNamespace(name="imagenet2012", dir=None), "train")
    assert list(source.names) == expected


def test_a_source_pickles_small_and_reads_the_same(root):
    source = TfdsImages("cifar10", root, "train")
    copy = pickle.loads(pickle.dumps(source))
    assert [copy[n] for n in range(20)] == [source[n] for n in range(20)]
    assert len(pickle.dumps(source)) < 20_000


@pytest.mark.parametrize("split", ["train", "test"])
def test_folder_array_record_and_tfrecord_give_the_same_batches(split, tfds_data, tmp_path):
    streams = []
    sources = [TfdsImages("cifar10", tfds_data / kind, split) for kind in FORMATS]
    for part, kept in (("train", "train"), ("val", "test")):
        as_folder(TfdsImages("cifar10", tfds_data / "tfrecord", kept), part, tmp_path / "folder")
    for source in (*sources, ImageFolder(tmp_path / "folder", split)):
        indices = select(source.labels, source.names, sampling_ratio=0.5 if split == "train" else 1.0)
        assert len(indices) == 10
        train = TrainExample(source, Slots(indices, 3, repeats=3), (24, 24), "resized")
        for example in (train, EvalExample(source, indices, (24, 24), 0.875)):
            streams.append(collect(example, batch_size=4, start=1, stop=4))
    for stream in streams[2:]:
        reference = streams[0] if "valid" not in stream[0] else streams[1]
        for batch, expected in zip(stream, reference, strict=True):
            assert all(np.array_equal(batch[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", FORMATS)
def test_workers_read_the_same_batches(kind, tfds_data):
    source = TfdsImages("imagenet2012", tfds_data / kind, "train")
    example = TrainExample(source, Slots(np.arange(24), 0, repeats=3), (16, 16), "resized")
    streams = [collect(example, batch_size=6, start=2, stop=6, workers=workers) for workers in (0, 1, 3)]
    for stream in streams[1:]:
        for batch, expected in zip(stream, streams[0], strict=True):
            assert all(np.array_equal(batch[name], expected[name]) for name in expected)
    assert (streams[0][0]["unreadable"] == -1).all()


def test_the_index_is_made_once_said_so_and_made_anew_when_a_shard_changes(root, capsys):
    TfdsImages("imagenet2012", root, "train")
    assert "Indexing 24 images of" in capsys.readouterr().err
    TfdsImages("imagenet2012", root, "train")
    assert capsys.readouterr().err == ""
    os.utime(shard(root), (1, 1))
    TfdsImages("imagenet2012", root, "train")
    assert "Indexing 24 images of" in capsys.readouterr().err


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def empty(path):
    path.write_bytes(b"")


def html(path):
    path.write_text("<html>504 Gateway Time-out</html>" * 10)


@pytest.mark.parametrize("damage", [cut, empty, html, os.unlink])
def test_a_damaged_or_missing_shard_is_named(damage, root):
    damage(shard(root))
    with pytest.raises(
        UserError, match=rf"the shard \S+{IMAGENET}/\S+-00001-of-00002.*[Cc]opy it.*\.$"
    ) as caught:
        TfdsImages("imagenet2012", root, "train")
    assert "\n" not in str(caught.value)


def test_a_bad_crc_is_found_when_the_record_is_read_and_only_then(tfds_data):
    path = shard(tfds_data / "tfrecord")
    data = bytearray(path.read_bytes())
    data[-100] ^= 1  # within the last record's payload
    path.write_bytes(data)
    source = TfdsImages("imagenet2012", tfds_data / "tfrecord", "train")
    failures = []
    for number in range(24):
        try:
            source[number]
        except UserError as error:
            failures.append(str(error))
    assert len(failures) == 1
    assert str(path) in failures[0]
    assert "CRC does not fit" in failures[0]


def test_a_length_with_a_bad_crc_is_refused_at_once(tfds_data):
    path = shard(tfds_data / "tfrecord")
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"damaged at byte 0 \(the CRC of a length"):
        TfdsImages("imagenet2012", tfds_data / "tfrecord", "train")


def test_a_shard_of_another_set_is_refused_by_its_count(tfds_data):
    root = tfds_data / "tfrecord"
    first, second = shard(root, 0), shard(root, 1)
    first.write_bytes(first.read_bytes() + second.read_bytes())
    with pytest.raises(UserError, match=r"00000-of-00002 holds 24 records, dataset_info\.json counts 12"):
        TfdsImages("imagenet2012", root, "train")


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        (
            "imagenet2012",
            lambda root: (root / "imagenet2012").rename(root / "x"),
            r"no TFDS data set 'imagenet2012' in .*expected .*data\.prepare.*data\.name=folder",
        ),
        ("cifar100", lambda root: None, r"no TFDS data set 'cifar100' in .*cifar100/VERSION/features\.json"),
        ("imagenette", lambda root: None, r"there is imagenette/160px-v2/1\.0\.0\."),
        ("imagenet2012:4.0.0", lambda root: None, r"there is imagenet2012/5\.1\.0\."),
        (
            "imagenet2012",
            lambda root: (root / IMAGENET).rename(root / "imagenet2012/incomplete.x_5.1.0"),
            r"incomplete\.x_5\.1\.0 was never finished",
        ),
        (
            "imagenet2012",
            lambda root: [(root / "imagenet2012").rename(root / "x"), (root / "train").mkdir()],
            r"is an image folder.*data\.name=folder",
        ),
    ],
    ids=["none", "another", "config", "version", "unfinished", "folder"],
)
def test_a_data_set_that_is_not_there_is_answered_with_where_and_how(name, damage, said, root):
    damage(root)
    with pytest.raises(UserError, match=said):
        TfdsImages(name, root, "train")


@pytest.mark.parametrize(
    ("file", "damage"),
    [(file, damage) for file in ("dataset_info.json", "features.json") for damage in (cut, empty, html)]
    + [("dataset_info.json", os.unlink)],
)
def test_a_damaged_description_is_said_in_a_sentence(file, damage, root):
    damage(root / IMAGENET / file)
    with pytest.raises(
        UserError, match=r"description of .*'imagenet2012' in .*damaged \(.+\): copy .*\.$"
    ) as said:
        TfdsImages("imagenet2012", root, "train")
    assert "\n" not in str(said.value)


def test_a_directory_without_a_train_split_says_what_happened(root):
    info = root / IMAGENET / "dataset_info.json"
    info.write_text(info.read_text().replace('"train"', '"test"'))
    with pytest.raises(UserError, match=r"5\.1\.0 has no train split, only .*training tar is missing; run"):
        TfdsImages("imagenet2012", root, "train")


def test_its_open_files_are_allowed_in_the_process_and_in_a_loaders_worker(tfds_data, monkeypatch):
    asked = []
    monkeypatch.setattr(open_files, "allow", lambda *given: asked.append(given))
    pickle.loads(pickle.dumps(TfdsImages("cifar10", tfds_data / "tfrecord", "train")))
    fewer = " or prepare the data set in fewer shards"
    assert asked == [(257, "a data set of 1 shards", fewer)] * 2


def test_of_several_labels_the_one_meant_to_be_learnt_is_taken(root):
    folder = root / "cifar10/3.0.2"
    features = json.loads((folder / "features.json").read_text())
    features["featuresDict"]["features"]["coarse"] = features["featuresDict"]["features"]["label"]
    (folder / "features.json").write_text(json.dumps(features))
    assert len(TfdsImages("cifar10", root, "train")) > 0
    info = json.loads((folder / "dataset_info.json").read_text())
    del info["supervisedKeys"]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match="has 1 images and 2 class labels"):
        TfdsImages("cifar10", root, "train")


def test_a_data_set_of_another_kind_is_refused(root):
    features = root / "cifar10/3.0.2/features.json"
    text = json.loads(features.read_text())
    text["featuresDict"]["features"]["label"] = text["featuresDict"]["features"]["id"]
    features.write_text(json.dumps(text))
    with pytest.raises(UserError, match=r"cifar10.* has 1 images and 0 class labels an example"):
        TfdsImages("cifar10", root, "train")
