"""TFDS directories made by TFDS's own builders, in both formats: the same images; messages about damage."""

import io
import json
import os
import pickle
import re
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import names, run_python
from PIL import Image

from convit_jax.data.sources import open_source
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


def flip_bit(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "split", "images", "classes", "first"),
    [
        ("imagenet2012", "train", 24, 1000, "n01739381/n01739381_"),
        ("imagenet2012", "test", 8, 1000, ""),
        ("imagenette/160px-v2", "test", 5, 10, ""),
        ("cifar10:3.0.2", "train", 20, 10, "airplane/train_0"),
    ],
)
def test_both_formats_give_the_same_images_in_the_order_of_label_and_name(
    name, split, images, classes, first, tfds_data
):
    one, other = (TfdsImages(name, tfds_data / kind, split) for kind in FORMATS)
    assert (len(one.labels), len(one.class_names)) == (images, classes)
    keys = list(zip(one.labels.tolist(), names(one), strict=True))
    assert keys == sorted(keys)
    assert keys == list(zip(other.labels.tolist(), names(other), strict=True))
    assert all(one[number] == other[number] for number in range(images))
    assert all(name.split("/")[0] == one.class_names[label] for label, name in keys)
    assert one.name(0).startswith(first)
    assert one.labels.dtype == np.int32
    modes = {Image.open(io.BytesIO(one[number])).mode for number in range(images)}
    assert modes == ({"RGB", "L", "CMYK"} if (name, split) == ("imagenet2012", "test") else {"RGB"})


def test_data_dir_may_be_the_root_or_the_data_set_and_defaults_to_tfds_data_dir(root, monkeypatch):
    expected = names(TfdsImages("imagenet2012", root, "train"))
    for directory in (root / "imagenet2012", root / IMAGENET):
        assert names(TfdsImages("imagenet2012", str(directory), "train")) == expected
    monkeypatch.setenv("TFDS_DATA_DIR", str(root))
    source = open_source(SimpleNamespace(name="imagenet2012", dir=None), "train")
    assert names(source) == expected


def test_a_pickled_source_is_small_and_reads_the_same(root):
    source = TfdsImages("imagenet2012", root, "train")
    content = pickle.dumps(source)
    assert len(content) < 40_000  # 1,000 class names
    assert [pickle.loads(content)[number] for number in range(24)] == [source[number] for number in range(24)]


def test_the_index_is_built_when_a_shard_changed_and_a_part_of_imagenet_is_reported(root, capsys):
    for changed, indexed in ((False, True), (False, False), (True, True)):
        if changed:
            os.utime(shard(root), (1, 1))
        TfdsImages("imagenet2012", root, "train")
        said = capsys.readouterr().err
        assert ("Indexing 24 images of" in said) == indexed
        assert "5.1.0 has 24 images in train; ImageNet has 1,281,167." in said
    TfdsImages("cifar10", root, "train")
    assert "Warning" not in capsys.readouterr().err


DAMAGES = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "html": lambda data: b"<html>504 Gateway Time-out</html>" * 10,
}


@pytest.mark.parametrize("damage", [*DAMAGES, "missing"])
def test_a_damaged_or_missing_shard_is_named(damage, root):
    path = shard(root)
    path.unlink() if damage == "missing" else path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(UserError, match=rf"^cannot read {path}.*\.$"):
        TfdsImages("imagenet2012", root, "train")


def test_tfrecord_damage_is_found_by_its_checksums_and_counts(tfds_data):
    root = tfds_data / "tfrecord"
    first, second = shard(root, 0), shard(root, 1)
    flip_bit(second, -100)  # in the last record: found when it is read
    source, failures = TfdsImages("imagenet2012", root, "train"), []
    for number in range(24):
        try:
            source[number]
        except UserError as error:
            failures.append(str(error))
    assert len(failures) == 1
    assert re.search(rf"{second}: it is damaged \(ValueError: wrong CRC of the record at byte", failures[0])
    first.write_bytes(first.read_bytes() + second.read_bytes())
    with pytest.raises(UserError, match=r"00000-of-00002: it is damaged \(ValueError: 24 records instead of the 12"):
        TfdsImages("imagenet2012", root, "train")
    flip_bit(first, 0)
    with pytest.raises(UserError, match=r"\(ValueError: wrong CRC of the length at byte 0"):
        TfdsImages("imagenet2012", root, "train")


def move(old, new):
    return lambda root: (root / old).rename(root / new)


def rewrite(file, change):
    return lambda root: (root / IMAGENET / file).write_bytes(change((root / IMAGENET / file).read_bytes()))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("imagenet2012", move("imagenet2012", "x"), r"features\.json, found none\. Set.*data\.prepare.*name=folder"),
        ("imagenette", None, r"imagenette/VERSION/features\.json, found imagenette/160px-v2/1\.0\.0\."),
        ("imagenet2012:4.0.0", None, r"found imagenet2012/5\.1\.0\."),
        ("/data/imagenet", None, r"data.name is '/data/imagenet', .*: a path belongs in --config\.data\.dir\.$"),
        ("digit", None, r"'digit' \(.*\), did you mean 'digits'\? Expected "),
        ("imagenet", None, r"'imagenet' \(.*\), did you mean 'imagenet2012'\? Expected "),
        ("imagenet2012", rewrite("dataset_info.json", lambda data: data.replace(b'"train"', b'"x"')), "no train split"),
        *(
            ("imagenet2012", rewrite(file, change), r"^cannot open the TFDS data set 'imagenet2012' \(.+\)\. Expected ")
            for file in ("dataset_info.json", "features.json")
            for change in DAMAGES.values()
        ),
    ],
)
def test_an_unusable_data_set_is_answered_with_where_and_how(name, damage, message, root):
    if damage:
        damage(root)
    with pytest.raises(UserError, match=message):
        TfdsImages(name, root, "train")


def test_all_shards_may_be_open(tfds_data):
    program = f"""
import resource
from convit_jax.data.tfds import TfdsImages
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 300))
TfdsImages("cifar10", {str(tfds_data / "tfrecord")!r}, "train")
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""
    assert run_python("-c", program).stdout == "257\n"


def test_the_supervised_label_is_chosen_and_other_kinds_of_data_sets_are_refused(root):
    folder = root / "cifar10/3.0.2"
    whole = json.loads((folder / "features.json").read_text())
    features = whole["featuresDict"]["features"]
    features["coarse"], features["mask"] = features["label"], features["image"]
    features["id"] = features["label"]  # an integer, which is no name
    (folder / "features.json").write_text(json.dumps(whole))
    assert re.fullmatch(r"airplane/\d{8}", TfdsImages("cifar10", root, "train").name(0))
    info = json.loads((folder / "dataset_info.json").read_text())
    del info["supervisedKeys"]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match="has 2 images and 3 class labels"):
        TfdsImages("cifar10", root, "train")
