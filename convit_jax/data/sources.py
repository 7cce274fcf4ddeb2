"""Labelled images from scikit-learn's digits, an image folder or TFDS, in an order that does not depend on storage."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from tqdm import tqdm

from convit_jax.data.index import Index, Source, cached_index, make_index
from convit_jax.data.tfds import TfdsImages
from convit_jax.errors import UserError, explained

IMAGE_SUFFIXES = (  # torchvision's, and others that Pillow reads
    *(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"),
    *(".avif", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".tga"),
)
LEFTOVERS = ("__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini", "lost+found")  # and hidden files
LARGE_FOLDER = 10_000  # images; a smaller folder is quickly listed again


class Digits(Source):
    """scikit-learn's 1,797 handwritten digits, 8 x 8 pixels, grey, as uint8 [8, 8, 3].

    The test split has 36 of each class, evenly spaced in scikit-learn's order, so that both splits have digits of
    every writer. The training split has the other 1,437.
    """

    class_names = tuple(str(digit) for digit in range(10))

    def __init__(self, split: str) -> None:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        chosen = []
        for digit in range(10):
            of_class = np.flatnonzero(labels == digit)
            in_test = np.linspace(0, len(of_class) - 1, 36).round().astype(int)
            chosen += [*(np.delete(of_class, in_test) if split == "train" else of_class[in_test])]
        self.index = make_index(labels[chosen], [f"{labels[number]}/{number:04d}" for number in chosen])
        grey = np.round(images[chosen].reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
        self.images = np.repeat(grey, 3, axis=3)

    def __getitem__(self, number: int) -> np.ndarray:
        return self.images[number]


class ImageFolder(Source):
    """Images in DIRECTORY/train/CLASS and DIRECTORY/val/CLASS (or test/CLASS), as torchvision reads them.

    The classes are the sorted folders of the training split, or of the test split if it is the only one. The
    files of a class may be in subfolders. The list of a large folder is kept (see index.py) until a class
    folder changes. Raises UserError if a folder is missing or empty, if there is one class only, or if the test split
    has other classes.
    """

    def __init__(self, directory: str | Path, split: str) -> None:
        parent = Path(directory).expanduser()
        train = parent / "train"
        choices = [train] if split == "train" else [parent / "val", parent / "test"]
        root = next((folder for folder in choices if folder.is_dir()), None)
        if root is None:
            raise UserError(
                f"{parent} has no folder {' or '.join(folder.name for folder in choices)}: data.dir must contain "
                f"{parent}/train/CLASS/*.jpg and {parent}/val/CLASS/*.jpg (or test/) if data.name is folder."
            )
        self.root, self._flat = root, True  # no class has subfolders
        self.class_names = _folders(train if train.is_dir() else root)
        if len(self.class_names) == 1:
            only = self.class_names[0]
            inside = _folders(root / only) if (root / only).is_dir() else ()
            remedy = f"move the folders in it ({', '.join(inside[:3])}, ...) up" if inside else "add other classes"
            raise UserError(f"{root} has a single class folder, {only!r}: {remedy}.")
        present = _folders(root)
        if unknown := sorted({*present} - {*self.class_names}):
            raise UserError(
                f"{root} has {len(unknown)} classes that {train} lacks, such as {unknown[0]!r}: "
                "both must have the same class folders."
            )
        # The times of the class folders change when a file directly in them comes or goes.
        self.index = cached_index(
            parent,  # not in a split's folder, whose folders are classes
            f"folder-{root.name}",
            [self.class_names, [(name, os.stat(root / name).st_mtime_ns) for name in present]],
            lambda: self._list({*present}),
            keep=lambda table: len(table) >= LARGE_FOLDER and self._flat,
        )
        empty = set(range(len(self.class_names))) - set(self.labels.tolist())
        if not len(self.labels) or (split == "train" and empty):
            name = self.class_names[min(empty)] if empty else "CLASS"
            raise UserError(
                f"{root / name} holds no image ({', '.join(IMAGE_SUFFIXES)}): add some, or remove the folder."
            )

    def __getitem__(self, number: int) -> bytes:
        path = self.root / self.name(number)
        with explained(path):
            return path.read_bytes()

    def _list(self, present: set[str]) -> Index:
        names: list[str] = []
        labels: list[int] = []
        unused: Counter[str] = Counter()
        for label, class_name in enumerate(tqdm(self.class_names, "Listing", unit=" classes", disable=None, delay=2)):
            if class_name not in present:
                continue
            visited: set[str] = set()
            found = walk_images(self.root / class_name, unused, visited)
            names += [path[len(f"{self.root}/") :] for path in found]
            labels += [label] * (len(names) - len(labels))
            self._flat &= len(visited) == 1
        if unused:
            self.note = f"{self.root}: not used: " + ", ".join(f"{unused[kind]:,} {kind}" for kind in sorted(unused))
        return make_index(labels, names)


def walk_images(folder: str | Path, unused: Counter[str], visited: set[str]) -> Iterator[str]:
    """Yields the paths of the images in a folder at any depth; `unused` counts the other files by kind.

    Links are followed, but each real folder is visited once: `visited` gets it. Hidden files and what other programs
    leave are skipped. Raises UserError for a folder that cannot be read.
    """
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=_refuse):
        real = os.path.realpath(parent)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(filter(_is_data, folders), key=lambda name: (os.path.islink(f"{parent}/{name}"), name))
        for name in files:
            suffix = os.path.splitext(name)[1].lower()
            if not _is_data(name):
                unused["hidden"] += 1
            elif suffix in IMAGE_SUFFIXES:
                yield os.path.join(parent, name)
            else:
                unused[suffix or "without suffix"] += 1


def _refuse(error: OSError) -> NoReturn:
    raise UserError(f"cannot read {error.filename} ({error.strerror}): check its permissions.") from error


def _is_data(name: str) -> bool:
    return not name.startswith(".") and name not in LEFTOVERS


def open_source(data: Any, split: str) -> Source:
    """Returns the "train" or "test" split of a config's `data` section; raises UserError if it cannot be used."""
    if data.name == "digits":
        return Digits(split)
    if data.name == "folder":
        if not data.dir:
            raise UserError("data.name is folder, but data.dir is empty: add --config.data.dir=FOLDER.")
        try:
            return ImageFolder(data.dir, split)
        except OSError as error:
            _refuse(error)
    return TfdsImages(data.name, data.dir, split)


def digest(source: Source) -> str:
    """Returns the SHA-256 of a source's classes and of the label and name of every image."""
    names = [os.fsencode(source.name(number)) for number in range(len(source.labels))]
    starts = np.cumsum([0, *map(len, names)], dtype=np.int64)
    parts = json.dumps(source.class_names).encode(), source.labels.tobytes(), b"".join(names), starts.tobytes()
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _folders(directory: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in os.scandir(directory) if entry.is_dir() and _is_data(entry.name)))
