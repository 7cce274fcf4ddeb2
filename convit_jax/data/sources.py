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
LARGE_FOLDER = 10_000  # images; a smaller folder is quickly listed again


class Source(Protocol):
    """Labelled images by number, in the order (label, name). It can be pickled, for the workers of the loader."""

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

    The test split has 36 of each class, evenly spaced in scikit-learn's order, so that both splits have digits of
    every writer. The training split has the other 1,437.
    """

    class_names = tuple(str(digit) for digit in range(10))

    def __init__(self, split: str) -> None:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        in_test = np.zeros(len(labels), bool)
        for digit in range(10):
            of_class = np.flatnonzero(labels == digit)
            positions = np.linspace(0, len(of_class) - 1, 36).round().astype(int)
            in_test[of_class[positions]] = True
        chosen = np.flatnonzero(~in_test if split == "train" else in_test)
        chosen = chosen[np.argsort(labels[chosen], kind="stable")]
        grey = np.round(images[chosen].reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
        self.images = np.repeat(grey, 3, axis=3)
        self.labels = labels[chosen].astype(np.int32)
        self.names = Names.pack([b"%d/%04d" % pair for pair in zip(self.labels, chosen, strict=True)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, number: int) -> np.ndarray:
        return self.images[number]


class ImageFolder(Indexed):
    """Images in DIRECTORY/train/CLASS and DIRECTORY/val/CLASS (or test/CLASS), as torchvision reads them.

    The classes are the sorted folders of the training split, or of the test split if it is the only one. The
    files of a class may be in subfolders. The list of a large folder is kept (see index.py) until a class
    folder changes. Raises UserError if a folder is missing or empty, or if the test split has other classes.
    """

    def __init__(self, directory: str | Path, split: str) -> None:
        parent = Path(directory).expanduser()
        self.root = _split_folder(parent, split)
        test_only = split != "train" and not (parent / "train").is_dir()
        train_root = self.root if test_only else _split_folder(parent, "train")
        self.class_names = _folders(train_root)
        if unknown := sorted({*_folders(self.root)} - {*self.class_names}):
            raise UserError(
                f"{self.root} has {len(unknown)} classes that {train_root} lacks, such as {unknown[0]!r}: "
                "both must have the same class folders."
            )
        # The times of the class folders change when a file directly in them comes or goes.
        folders = [(name, self.root / name) for name in self.class_names if (self.root / name).is_dir()]
        self.index = cached_index(
            parent,  # not in a split's folder, whose folders are classes
            f"folder-{self.root.name}",
            [self.class_names, [(name, os.stat(folder).st_mtime_ns) for name, folder in folders]],
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
        progress = tqdm(self.class_names, "Listing", unit=" classes", disable=None, delay=2)
        for label, name in enumerate(progress):
            for folder, _, files in os.walk(self.root / name, followlinks=True):
                inside = os.path.relpath(folder, self.root)
                names += [f"{inside}/{file}" for file in files if file.lower().endswith(IMAGE_SUFFIXES)]
            if len(names) == len(labels) and complete:
                raise UserError(
                    f"the class folder {self.root / name} holds no image ({', '.join(IMAGE_SUFFIXES)}): "
                    "add some or remove the folder."
                )
            labels += [label] * (len(names) - len(labels))
        return make_index(labels, names, flat=np.array([name.count("/") == 1 for name in names], bool))


def open_source(data: Any, split: str) -> Source:
    """Returns the "train" or "test" split of a config's `data` section; raises UserError if it cannot be used."""
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


def _folders(directory: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in os.scandir(directory) if entry.is_dir()))


def _split_folder(directory: Path, split: str) -> Path:
    names = ("train",) if split == "train" else ("val", "test")
    for name in names:
        if (directory / name).is_dir():
            return directory / name
    raise UserError(
        f"{directory} has no folder {' or '.join(names)}: data.dir must contain {directory}/train/CLASS/*.jpg "
        f"and {directory}/val/CLASS/*.jpg (or test/) if data.name is folder."
    )
