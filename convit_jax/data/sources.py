"""Where images come from: a Source gives records by index.

A source has `labels` (int32 [n]), `names` (n strings CLASS/FILE, unique; index.Names) and `class_names`;
`source[i]` is either the bytes of an image file or a uint8 array [H, W, 3]. Its records are in the order
(label, name), so that the same images give the same training from whatever they are read. Sources
pickle, so that loader workers can hold them. Two kinds are here: scikit-learn's digits, which need no
download, and an image folder in torchvision's layout; TFDS has a module of its own.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
from tqdm import tqdm

from convit_jax.data.index import Indexed, Names, cached_index, make_index
from convit_jax.data.tfds import TfdsImages
from convit_jax.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's
TEST_DIGITS_PER_CLASS = 36
LARGE_FOLDER = 10_000  # images; the list of a smaller folder is made in no time


class Digits:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 grey, as uint8 [8, 8, 3].

    360 of them are for the test, 36 a class at equal distances in the order of the package
    (so that every writer is on both sides); the other 1,437 are for training.
    """

    class_names = tuple(str(digit) for digit in range(10))

    def __init__(self, split):
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
        names = [f"{label}/{index:04d}" for label, index in zip(self.labels, chosen, strict=True)]
        self.names = Names(*Names.pack([name.encode() for name in names]))

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.images[index]


class ImageFolder(Indexed):
    """Images below DIRECTORY/train/CLASS and DIRECTORY/val/CLASS (or test/CLASS), as torchvision reads them.

    Classes are the sorted folders of the training split, or of the test if there is no other, which is enough
    to evaluate weights; a class's files are found at any depth. Records
    are the files' bytes. The list of a large folder is kept (see index.py) until a class folder changes.
    """

    def __init__(self, directory, split):
        self.root = _split_folder(Path(directory).expanduser(), split)
        alone = split != "train" and not (Path(directory).expanduser() / "train").is_dir()
        train_root = self.root if alone else _split_folder(Path(directory).expanduser(), "train")
        self.class_names = tuple(sorted(entry.name for entry in os.scandir(train_root) if entry.is_dir()))
        if not self.class_names:
            raise UserError(
                f"{train_root} has no class folders: put the images of each class into {train_root}/CLASS/."
            )
        if self.root != train_root:
            unknown = {entry.name for entry in os.scandir(self.root) if entry.is_dir()} - {*self.class_names}
            if unknown:
                raise UserError(
                    f"{self.root} has {len(unknown)} classes that {train_root} lacks, as {min(unknown)!r}: "
                    "both must use the same class folders."
                )
        self.index = cached_index(
            self.root,
            "folder",
            _folder_fingerprint(self.root, self.class_names),
            lambda: self._list(complete=self.root == train_root),
            keep=lambda index: len(index["labels"]) >= LARGE_FOLDER and index["flat"].all(),
        )
        if not len(self):
            raise UserError(f"{self.root} holds no image: expected {self.root}/CLASS/*.jpg.")

    def _list(self, complete):
        """The index of all images; complete: every class must have one."""
        names, labels, flat = [], [], []
        for label, class_name in enumerate(
            tqdm(self.class_names, "Listing", unit=" classes", disable=None, delay=2)
        ):
            files = _image_files(self.root / class_name)
            if not files and complete:
                raise UserError(
                    f"the class folder {self.root / class_name} holds no image "
                    f"({', '.join(IMAGE_SUFFIXES)}): add some or remove the folder."
                )
            names += [f"{class_name}/{file}" for file in files]
            labels += [label] * len(files)
            flat += [os.sep not in file for file in files]
        return make_index(labels, names, flat=np.array(flat, bool))

    def __getitem__(self, index):
        path = self.root / self.names[index]
        try:
            return path.read_bytes()
        except OSError as error:
            raise UserError(
                f"cannot read the image {path} ({error.strerror}): restore or remove it."
            ) from error


def _folder_fingerprint(root, class_names):
    """Of the class folders' times, which change when a file in them (not deeper) is added or removed."""
    times = [(name, os.stat(root / name).st_mtime_ns) for name in class_names if (root / name).is_dir()]
    return hashlib.sha256(json.dumps([class_names, times]).encode()).hexdigest()


def _split_folder(directory, split):
    """DIRECTORY/train, or the validation images in DIRECTORY/val or DIRECTORY/test."""
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


def _image_files(folder):
    """Paths, relative to folder, of the image files below it."""
    found = []
    for where, _, files in os.walk(folder, followlinks=True):
        prefix = os.path.relpath(where, folder)
        found += [
            os.path.normpath(os.path.join(prefix, file))
            for file in files
            if file.lower().endswith(IMAGE_SUFFIXES)
        ]
    return found


def open_source(data, split):
    """The source of a config's `data` section; split is "train" or "test".

    Raises:
      UserError: no such data, or nothing usable there.
    """
    if data.name == "digits":
        return Digits(split)
    if data.name == "folder":
        if not data.dir:
            raise UserError("data.name is folder but data.dir is empty: add --config.data.dir=FOLDER.")
        return ImageFolder(data.dir, split)
    return TfdsImages(data.name, data.dir, split)
