"""Sources: the digits' fixed split, image folders as torchvision reads them, what is said of bad ones."""

import io
import os
import pickle
import re
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from convit_jax.data import sources
from convit_jax.data.sources import Digits, ImageFolder, open_source
from convit_jax.errors import UserError

FILES = {  # in the order in which they must come, with the order of creation shuffled by the fixture
    "train": ["B/1.png", "B/10.png", "B/2.PNG", "a/deep/er/c.jpeg", "a/deep/y.bmp", "a/x.jpg", "c/z.webp"],
    "val": ["B/3.jpg", "c/1.JPG", "c/2.jpg"],
}
LABELS = {"train": [0, 0, 0, 1, 1, 1, 2], "val": [0, 2, 2]}


def write_image(path, colour=(10, 20, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), colour).save(path)


@pytest.fixture
def folder(tmp_path):
    for split, files in FILES.items():
        for number, file in enumerate(reversed(files)):
            write_image(tmp_path / split / file, (number * 20, 0, 0))
    (tmp_path / "train/a/notes.txt").write_text("not an image")
    (tmp_path / "train/README.jpg").write_text("not in a class")
    return tmp_path


@pytest.fixture(scope="module")
def digits():
    return Digits("train"), Digits("test")


def test_digits_are_split_in_1437_and_360_with_36_of_each_class_in_the_test(digits):
    train, test = digits
    assert (len(train), len(test)) == (1437, 360)
    assert np.bincount(test.labels).tolist() == [36] * 10
    assert len(train.labels) == len(train.names) == len(train.images) == 1437


def test_the_two_digit_splits_share_nothing_and_together_are_the_whole_data_set(digits):
    train, test = digits
    pixels, labels = load_digits(return_X_y=True)
    numbers = [int(name.split("/")[1]) for name in [*train.names, *test.names]]
    assert sorted(numbers) == list(range(1797))
    np.testing.assert_array_equal(np.concatenate([train.labels, test.labels]), labels[numbers])
    shown = np.concatenate([train.images, test.images])
    assert np.abs(shown - (pixels[numbers] * 255 / 16).reshape(-1, 8, 8, 1)).max() <= 0.5
    assert (shown.min(), shown.max()) == (0, 255)


def test_the_split_of_the_digits_is_the_one_that_results_are_reported_on(digits):
    numbers = sorted(int(name.split("/")[1]) for name in digits[1].names)
    assert numbers[180:184] == [905, 907, 915, 926]
    assert sum(numbers) == 323_155
    assert list(Digits("test").names) == list(digits[1].names)


def test_a_digit_is_a_grey_uint8_rgb_image_and_carries_its_class_in_its_name(digits):
    for source in digits:
        assert source[5].dtype == np.uint8
        assert source[5].shape == (8, 8, 3)
        assert (source[5] == source[5][..., :1]).all()
        assert source.labels.dtype == np.int32
        assert source.class_names == tuple("0123456789")
        assert all(
            name.split("/")[0] == str(label) for name, label in zip(source.names, source.labels, strict=True)
        )


def test_a_folder_is_read_in_sorted_order_of_classes_then_names(folder):
    train, val = ImageFolder(folder, "train"), ImageFolder(folder, "test")
    assert train.class_names == val.class_names == ("B", "a", "c")
    assert [name for name in train.names if name[0] == "B"] == ["B/1.png", "B/10.png", "B/2.PNG"]
    assert [name for name in train.names if name[0] == "a"] == ["a/deep/er/c.jpeg", "a/deep/y.bmp", "a/x.jpg"]
    assert len(train) == len(FILES["train"])
    assert list(train.names) == FILES["train"]
    assert list(val.names) == FILES["val"]
    assert train.labels.tolist() == LABELS["train"]
    assert val.labels.tolist() == LABELS["val"]
    assert val.labels.dtype == np.int32


def test_a_record_is_the_bytes_of_the_file_that_its_name_names(folder):
    for split in FILES:
        source = ImageFolder(str(folder), split)
        for index, name in enumerate(source.names):
            assert source[index] == (folder / split / name).read_bytes()
            assert Image.open(io.BytesIO(source[index])).size == (6, 4)


def test_the_held_out_images_are_in_val_or_in_test(folder):
    before = list(ImageFolder(folder, "test").names)
    (folder / "val").rename(folder / "test")
    assert list(ImageFolder(folder, "test").names) == before


@pytest.mark.parametrize("kind", ["digits", "folder"])
def test_a_source_survives_pickling(kind, folder):
    source = open_source(SimpleNamespace(name=kind, dir=str(folder)), "train")
    copy = pickle.loads(pickle.dumps(source))
    assert len(copy) == len(source)
    assert list(copy.names) == list(source.names)
    np.testing.assert_array_equal(copy.labels, source.labels)
    np.testing.assert_array_equal(np.asarray(copy[3]), np.asarray(source[3]))


@pytest.mark.parametrize(("name", "kind"), [("digits", Digits), ("folder", ImageFolder)])
@pytest.mark.parametrize("split", ["train", "test"])
def test_open_source_opens_what_the_config_names(name, kind, split, folder):
    source = open_source(SimpleNamespace(name=name, dir=str(folder)), split)
    assert isinstance(source, kind)
    expected = LABELS["train" if split == "train" else "val"] if name == "folder" else kind(split).labels
    np.testing.assert_array_equal(source.labels, expected)


def remove(path):
    """A file or a whole folder."""
    for entry in path.iterdir() if path.is_dir() else ():
        remove(entry)
    path.rmdir() if path.is_dir() else path.unlink()


def no_directory(root):
    remove(root / "train")
    remove(root / "val")
    remove(root)


def class_that_only_val_has(root):
    write_image(root / "val/dog/1.jpg")


def class_without_an_image(root):
    (root / "train/dog").mkdir()
    (root / "train/dog/notes.txt").write_text("not an image")


def no_class(root):
    remove(root / "train")
    write_image(root / "train/1.jpg")


def no_image_in_val(root):
    remove(root / "val")
    (root / "val/a").mkdir(parents=True)


@pytest.mark.parametrize(
    ("damage", "split", "named", "remedy"),
    [
        (no_directory, "train", "{root}", "data.dir"),
        (
            lambda root: remove(root / "train"),
            "train",
            "{root} has no folder train",
            "{root}/train/CLASS/*.jpg",
        ),
        (
            lambda root: remove(root / "val"),
            "test",
            "{root} has no folder val or test",
            "{root}/val/CLASS/*.jpg",
        ),
        (no_class, "train", "{root}/train has no class folders", "{root}/train/CLASS/"),
        (class_without_an_image, "train", "{root}/train/dog holds no image", "remove the folder"),
        (class_that_only_val_has, "test", "'dog'", "same class folders"),
        (no_image_in_val, "test", "{root}/val holds no image", "{root}/val/CLASS/*.jpg"),
    ],
    ids=["nothing", "train", "val", "classes", "empty class", "unknown class", "empty val"],
)
def test_a_folder_that_cannot_be_used_is_refused_by_name_with_the_remedy(
    damage, split, named, remedy, folder
):
    root = folder / "data"
    root.mkdir()
    for part in FILES:
        (folder / part).rename(root / part)
    damage(root)
    with pytest.raises(UserError) as caught:
        ImageFolder(root, split)
    message = str(caught.value)
    assert named.format(root=root) in message
    assert remedy.format(root=root) in message
    assert message.endswith(".")
    assert "\n" not in message


def test_held_out_images_alone_are_enough_to_evaluate(folder):
    remove(folder / "train")
    assert ImageFolder(folder, "test").class_names == tuple(
        sorted(path.name for path in (folder / "val").iterdir())
    )
    with pytest.raises(UserError, match="has no folder train"):
        ImageFolder(folder, "train")


def test_an_image_that_disappeared_after_listing_is_named(folder):
    source = ImageFolder(folder, "train")
    (folder / "train/B/10.png").unlink()
    with pytest.raises(UserError, match=re.escape(str(folder / "train/B/10.png"))):
        source[1]


@pytest.mark.parametrize("directory", [None, ""])
def test_a_folder_without_data_dir_asks_for_it(directory):
    with pytest.raises(UserError, match=r"data\.dir is empty: add --config\.data\.dir=FOLDER"):
        open_source(SimpleNamespace(name="folder", dir=directory), "train")


@pytest.mark.parametrize(
    ("typed", "meant"), [("digit", "digits"), ("Folder", "folder"), ("imagenet", "imagenet2012")]
)
def test_a_mistyped_data_name_is_answered_with_the_nearest(typed, meant, tmp_path):
    with pytest.raises(UserError, match=rf"data\.name is '{typed}', did you mean '{meant}'\? there is no"):
        open_source(SimpleNamespace(name=typed, dir=str(tmp_path)), "train")


def test_the_list_of_a_large_folder_is_kept_until_a_file_comes_or_goes(folder, monkeypatch):
    for file in (folder / "train/a/deep").rglob("*.*"):  # a flat folder, as ImageNet's
        file.unlink()
    monkeypatch.setattr(sources, "LARGE_FOLDER", 3)
    names = list(ImageFolder(folder, "train").names)
    assert list(folder.glob("train/.convit_jax-folder.index"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "walk", None)
        kept = ImageFolder(folder, "train")
        assert list(kept.names) == names
        assert list(pickle.loads(pickle.dumps(kept)).names) == names
    write_image(folder / "train/a/new.jpg")
    assert list(ImageFolder(folder, "train").names) == sorted([*names, "a/new.jpg"])
    (folder / "train/a/new.jpg").unlink()
    assert list(ImageFolder(folder, "train").names) == names


def test_the_list_of_a_folder_with_folders_in_its_classes_is_made_anew(folder, monkeypatch):
    monkeypatch.setattr(sources, "LARGE_FOLDER", 3)
    before = len(ImageFolder(folder, "train"))
    write_image(folder / "train/a/deep/er/new.jpg")
    assert len(ImageFolder(folder, "train")) == before + 1
