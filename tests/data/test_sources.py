"""Sources: the digits' fixed split, image folders as torchvision reads them, messages about unusable ones."""

import errno
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import names
from PIL import Image
from sklearn.datasets import load_digits

from convit_jax.data import sources
from convit_jax.data.index import Source, make_index
from convit_jax.data.sources import Digits, ImageFolder, digest, open_source
from convit_jax.errors import UserError

FILES = {  # in the expected order; the fixture creates them in another one
    "train": ["B/1.png", "B/10.png", "B/2.PNG", "a/deep/er/c.jpeg", "a/deep/y.bmp", "a/x.jpg", "c/z.webp"],
    "val": ["B/3.jpg", "c/1.JPG", "c/2.jpg"],
}
LABELS = {"train": [0, 0, 0, 1, 1, 1, 2], "val": [0, 2, 2]}


def write_image(path, colour=(10, 20, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 4), colour).save(path)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "data"
    for split, files in FILES.items():
        for number, file in enumerate(reversed(files)):
            write_image(root / split / file, (number * 20, 0, 0))
    (root / "train/a/notes.txt").write_text("not an image")
    (root / "train/README.jpg").write_text("not in a class")
    return root


def test_the_split_of_the_digits_is_fixed_and_complete():
    train, test = Digits("train"), Digits("test")
    assert (len(train.labels), len(test.labels)) == (1437, 360)
    assert np.bincount(test.labels).tolist() == [36] * 10
    pixels, labels = load_digits(return_X_y=True)
    numbers = [int(name.split("/")[1]) for name in names(train) + names(test)]
    assert sorted(numbers) == list(range(1797))
    assert sum(numbers[1437:]) == 323_155
    np.testing.assert_array_equal(np.concatenate([train.labels, test.labels]), labels[numbers])
    shown = np.concatenate([train.images, test.images])
    assert np.abs(shown - (pixels[numbers] * 255 / 16).reshape(-1, 8, 8, 1)).max() <= 0.5
    assert (train[5].dtype, train[5].shape) == (np.uint8, (8, 8, 3))
    assert (train.labels.dtype, train.class_names) == (np.int32, tuple("0123456789"))
    assert all(int(name[0]) == label for name, label in zip(names(train), train.labels, strict=True))


def test_a_folder_is_read_in_the_order_of_classes_and_names(folder):
    for split, part in (("test", "val"), ("train", "train")):
        source = ImageFolder(str(folder), split)
        assert (source.class_names, source.labels.dtype) == (("B", "a", "c"), np.int32)
        assert (names(source), source.labels.tolist()) == (FILES[part], LABELS[part])
        assert all(source[number] == (folder / part / name).read_bytes() for number, name in enumerate(names(source)))
    (folder / "train/B/10.png").unlink()
    with pytest.raises(UserError, match=f"cannot read {folder}/train/B/10.png"):
        source[1]


def test_what_other_programs_leave_is_skipped_and_counted(folder):
    for name in ("a/.ipynb_checkpoints/x.jpg", "a/@eaDir/x.jpg", "a/._x.jpg", ".thumbnails/x.png", "a/deep/z.gif"):
        write_image(folder / "train" / name)
    (folder / "train/a/photo.heic").write_bytes(b"")
    (folder / "train/a/deep/again").symlink_to(folder / "train/a")
    source = ImageFolder(folder, "train")
    assert source.class_names == ("B", "a", "c")
    assert names(source) == [*FILES["train"][:5], "a/deep/z.gif", *FILES["train"][5:]]
    assert source.note == f"{folder}/train: not used: 1 .heic, 1 .txt, 1 hidden"


def test_names_that_are_not_utf_8_stay_what_they_are(folder):
    odd = os.fsdecode(b"\xe9t\xe9.jpg")
    write_image(folder / "train/a" / odd)
    source = ImageFolder(folder, "train")
    assert source.name(6) == f"a/{odd}"
    assert source[6]
    digest(source)


def test_the_test_images_are_in_val_or_test_and_may_be_the_only_ones(folder):
    (folder / "val").rename(folder / "test")
    assert names(ImageFolder(folder, "test")) == FILES["val"]
    shutil.rmtree(folder / "train")
    assert ImageFolder(folder, "test").class_names == ("B", "c")


def test_a_digest_depends_on_every_label_name_and_class_but_not_on_the_listing():
    def of(labels, names, classes=("a", "b")):
        source = Source()
        source.index, source.class_names = make_index(labels, names), classes
        return digest(source)

    labels, names = [1, 0, 1, 0], ["b/10", "a/é", "b/1", "a/2"]
    assert of(labels, names) == of(labels[::-1], names[::-1])
    others = of([0, 1, 0, 1], names), of(labels, ["b/10", "a/e", "b/1", "a/2"]), of(labels, names, ("b", "a"))
    assert len({of(labels, names), *others}) == 4


def no_class(root):
    shutil.rmtree(root / "train")
    write_image(root / "train/1.jpg")


def one_too_deep(root):
    (root / "train").rename(root / "images")
    (root / "train").mkdir()
    (root / "images").rename(root / "train/images")


def empty_val(root):
    shutil.rmtree(root / "val")
    (root / "val/a").mkdir(parents=True)


@pytest.mark.parametrize(
    ("damage", "split", "message"),
    [
        (shutil.rmtree, "train", r"{root} has no folder train: data\.dir must contain {root}/train/CLASS/"),
        (lambda root: shutil.rmtree(root / "val"), "test", "has no folder val or test: "),
        (no_class, "train", "{root}/train/CLASS holds no image"),
        (lambda root: (root / "train/dog").mkdir(), "train", "{root}/train/dog holds no image .* remove the folder"),
        (lambda root: write_image(root / "val/dog/1.jpg"), "test", "'dog': both must have the same class folders"),
        (one_too_deep, "train", r"single class folder, 'images': move the folders in it \(B, a, c, ...\) up"),
        (empty_val, "test", "{root}/val/B holds no image"),
    ],
    ids=["nothing", "val", "classes", "empty class", "unknown class", "one too deep", "empty val"],
)
def test_an_unusable_folder_is_named_with_the_remedy(damage, split, message, folder):
    damage(folder)
    with pytest.raises(UserError, match=f"^.*{message.format(root=folder)}.*\\.$"):
        ImageFolder(folder, split)


def test_the_list_of_a_large_flat_folder_is_kept_until_a_file_comes_or_goes(folder, monkeypatch):
    ImageFolder(folder, "train")
    assert sorted(os.listdir(folder)) == ["train", "val"]  # a small folder is listed again
    monkeypatch.setattr(sources, "LARGE_FOLDER", 3)
    before = names(ImageFolder(folder, "train"))
    write_image(folder / "train/a/deep/er/new.jpg")  # changes no time of a class folder
    assert len(ImageFolder(folder, "train").labels) == len(before) + 1
    shutil.rmtree(folder / "train/a/deep")
    (folder / "train/a/empty").mkdir()
    before = names(ImageFolder(folder, "train"))
    write_image(folder / "train/a/empty/new.jpg")
    assert len(ImageFolder(folder, "train").labels) == len(before) + 1
    shutil.rmtree(folder / "train/a/empty")

    listed = names(ImageFolder(folder, "train"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "walk", None)
        kept = ImageFolder(folder, "train")
        assert names(kept) == names(pickle.loads(pickle.dumps(kept))) == listed
        assert kept.class_names == ("B", "a", "c")  # the index is not in the folder of the classes
    assert [path.parent for path in folder.glob(".convit_jax-folder-train-*")] == [folder]
    write_image(folder / "train/a/new.jpg")
    assert names(ImageFolder(folder, "train")) == sorted([*listed, "a/new.jpg"])
    (folder / "train/a/new.jpg").unlink()
    assert names(ImageFolder(folder, "train")) == listed


@pytest.mark.parametrize("lost", ["train", "train/a", "val/c"])
def test_a_folder_that_cannot_be_read_is_no_empty_folder(lost, folder, monkeypatch):
    def scandir(path, real=os.scandir):
        if Path(path) == folder / lost:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(sources, "LARGE_FOLDER", 1)
    with pytest.raises(UserError, match=rf"cannot read {folder / lost} \(Permission denied\): check its perm"):
        open_source(SimpleNamespace(name="folder", dir=folder), lost.split("/")[0].replace("val", "test"))
    assert sorted(os.listdir(folder)) == ["train", "val"]  # no list is kept
