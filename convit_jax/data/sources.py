"""Sources: labelled images by number, from scikit-learn's digits, an image folder or TFDS.

The order is (label, name) in every source, so that training does not depend on how the images are stored.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from convit_jax.data.index import Index, Indexed, Names, cached_index, make_index
from convit_jax.data.tfds import TfdsImages
from convit_jax.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's
TEST_DIGITS_PER_CLASS = 36
LARGE_FOLDER = 10_000  # images; a smaller folder is quickly listed again


class Source(Protocol):
    """Labelled images by number, in the order (label, name).

    A source can be pickled: the workers of the loader hold a copy.
    """

    class_names: tuple[str, ...]

    @property
    def labels(self) -> np.ndarray:
        """Class of each image, int32 [n]."""

    @property
    def names(self) -> Names:
        """Name of each image, CLASS/FILE, unique."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> bytes | np.ndarray:
        """Returns the content of an image file, or pixels as uint8 [H, W, 3]."""


class Digits:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 pixels, grey, as uint8 [8, 8, 3].

    The test split has 360 of them: 36 per class, evenly spaced in scikit-learn's order, so that both splits
    have digits of every writer. The training split has the other 1,437.
    """

    class_names = tuple(str(digit) for digit in range(10))

    def __init__(self, split: str) -> None:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        in_test = np.zeros(len(labels), bool)
        for digit in range(10):
            of_class = np.flatnonzero(labels == digit)
            positions = np.linspace(0, len(of_class) - 1, TEST_DIGITS_PER_CLASS).round().astype(int)
            in_test[of_class[positions]] = True
        chosen = np.flatnonzero(~in_test if split == "train" else in_test)
        chosen = chosen[np.argsort(labels[chosen], kind="stable")]
        grey = np.round(images[chosen].reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
        self.images = np.repeat(grey, 3, axis=3)
        self.labels = labels[chosen].astype(np.int32)
        names = [f"{label}/{number:04d}" for label, number in zip(self.labels, chosen, strict=True)]
        self.names = Names.pack([name.encode() for name in names])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> np.ndarray:
        return self.images[number]


class ImageFolder(Indexed):
    """Images in DIRECTORY/train/CLASS and DIRECTORY/val/CLASS (or test/CLASS), as torchvision reads them.

    The classes are the sorted folders of the training split, or of the test split if it is the only one. The
    files of a class may be in subfolders. The list of a large folder is kept (see index.py) until a class
    folder changes.

    Args:
      directory: that contains the splits.
      split: "train" or "test".

    Raises:
      UserError: a folder is missing or empty, or the test split has other classes.
    """

    def __init__(self, directory: str | Path, split: str) -> None:
        parent = Path(directory).expanduser()
        self.root = _split_folder(parent, split)
        test_only = split != "train" and not (parent / "train").is_dir()
        train_root = self.root if test_only else _split_folder(parent, "train")
        self.class_names = tuple(_folders(train_root))
        if not self.class_names:
            raise UserError(
                f"{train_root} has no class folders: put the images of each class into {train_root}/CLASS/."
            )
        if unknown := sorted({*_folders(self.root)} - {*self.class_names}):
            raise UserError(
                f"{self.root} has {len(unknown)} classes that {train_root} lacks, such as {unknown[0]!r}: "
                "both must have the same class folders."
            )
        self.index = cached_index(
            parent,  # not in a split's folder, whose folders are classes
            f"folder-{self.root.name}",
            _fingerprint(self.root, self.class_names),
            lambda: self._list(complete=self.root == train_root),
            keep=lambda arrays: len(arrays["flat"]) >= LARGE_FOLDER and bool(arrays["flat"].all()),
        )
        if not len(self):
            raise UserError(f"{self.root} holds no image: expected {self.root}/CLASS/*.jpg.")

    def __getitem__(self, number: int) -> bytes:
        path = self.root / self.names[number]
        try:
            return path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read the image {path} ({error.strerror}): restore or remove it.") from error

    def _list(self, complete: bool) -> Index:
        """Builds the index; if `complete`, every class must have an image."""
        names: list[str] = []
        labels: list[int] = []
        flat: list[bool] = []
        progress = tqdm(self.class_names, "Listing", unit=" classes", disable=None, delay=2)
        for label, name in enumerate(progress):
            files = _image_files(self.root / name)
            if not files and complete:
                raise UserError(
                    f"the class folder {self.root / name} holds no image ({', '.join(IMAGE_SUFFIXES)}): "
                    "add some or remove the folder."
                )
            names += [f"{name}/{file}" for file in files]
            labels += [label] * len(files)
            flat += [os.sep not in file for file in files]
        return make_index(labels, names, flat=np.array(flat, bool))


def open_source(data: Any, split: str) -> Source:
    """Returns the source of a config's `data` section.

    Args:
      data: has the fields name and dir.
      split: "train" or "test".

    Raises:
      UserError: there is no such data, or it cannot be used.
    """
    if data.name == "digits":
        return Digits(split)
    if data.name == "folder":
        if not data.dir:
            raise UserError("data.name is folder but data.dir is empty: add --config.data.dir=FOLDER.")
        return ImageFolder(data.dir, split)
    return TfdsImages(data.name, data.dir, split)


def digest(source: Source) -> str:
    """Returns the SHA-256 of a source's classes and of the label and name of every image."""
    whole = hashlib.sha256(json.dumps(source.class_names).encode())
    for array in (source.labels, source.names.text, source.names.starts):
        whole.update(np.ascontiguousarray(array).data)
    return whole.hexdigest()


def _folders(directory: Path) -> list[str]:
    """Lists the sorted names of the folders in a directory."""
    return sorted(entry.name for entry in os.scandir(directory) if entry.is_dir())


def _split_folder(directory: Path, split: str) -> Path:
    """Returns DIRECTORY/train, or DIRECTORY/val or DIRECTORY/test."""
    names = ("train",) if split == "train" else ("val", "test")
    for name in names:
        if (directory / name).is_dir():
            return directory / name
    if not directory.is_dir():
        raise UserError(f"there is no folder {directory}: set --config.data.dir to the image folder.")
    raise UserError(
        f"{directory} has no folder {' or '.join(names)}: data.name=folder expects "
        f"{directory}/train/CLASS/*.jpg and {directory}/val/CLASS/*.jpg (or test/)."
    )


def _fingerprint(root: Path, class_names: tuple[str, ...]) -> str:
    """Hashes the times of the class folders, which change when a file directly in them comes or goes."""
    times = [(name, os.stat(root / name).st_mtime_ns) for name in class_names if (root / name).is_dir()]
    return hashlib.sha256(json.dumps([class_names, times]).encode()).hexdigest()


def _image_files(folder: Path) -> list[str]:
    """Lists the image files in a folder and its subfolders, relative to it."""
    found = []
    for where, _, files in os.walk(folder, followlinks=True):
        prefix = "" if where == str(folder) else os.path.relpath(where, folder)
        found += [os.path.join(prefix, file) for file in files if file.lower().endswith(IMAGE_SUFFIXES)]
    return found
