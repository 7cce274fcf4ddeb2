"""Where images come from: a Source gives records by index.

A source has `labels` (int32 [n]), `names` (n strings CLASS/FILE, unique) and `class_names`;
`source[i]` is either the bytes of an image file or a uint8 array [H, W, 3]. Sources pickle, so
that loader workers can hold them. Two kinds are here: scikit-learn's digits, which need no
download, and an image folder in torchvision's layout.
"""

import os
from pathlib import Path

import numpy as np

from convit_jax.errors import UserError, nearest

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's
TEST_DIGITS_PER_CLASS = 36


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
        grey = np.round(images[chosen].reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
        self.images = np.repeat(grey, 3, axis=3)
        self.labels = labels[chosen].astype(np.int32)
        self.names = [f"{label}/{index:04d}" for label, index in zip(self.labels, chosen, strict=True)]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.images[index]


class ImageFolder:
    """Images below DIRECTORY/train/CLASS and DIRECTORY/val/CLASS (or test/CLASS), as torchvision reads them.

    Classes are the sorted folders of the training split; a class's files are found at any depth,
    in sorted order. Records are the files' bytes.
    """

    def __init__(self, directory, split):
        self.root = _split_folder(Path(directory).expanduser(), split)
        train_root = _split_folder(Path(directory).expanduser(), "train")
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
        self.names, labels = [], []
        for label, class_name in enumerate(self.class_names):
            files = _image_files(self.root / class_name)
            if not files and self.root == train_root:
                raise UserError(
                    f"the class folder {self.root / class_name} holds no image "
                    f"({', '.join(IMAGE_SUFFIXES)}): add some or remove the folder."
                )
            self.names += [f"{class_name}/{file}" for file in files]
            labels += [label] * len(files)
        if not self.names:
            raise UserError(f"{self.root} holds no image: expected {self.root}/CLASS/*.jpg.")
        self.labels = np.array(labels, np.int32)

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        path = self.root / self.names[index]
        try:
            return path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read the image {path}: {error.strerror}.") from error


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
    """Sorted paths, relative to folder, of the image files below it."""
    found = []
    for where, _, files in sorted(os.walk(folder, followlinks=True)):
        prefix = os.path.relpath(where, folder)
        found += [
            os.path.normpath(os.path.join(prefix, file))
            for file in sorted(files)
            if file.lower().endswith(IMAGE_SUFFIXES)
        ]
    return found


def open_source(data, split):
    """The source of a config's `data` section; split is "train" or "test".

    Raises:
      UserError: unknown data.name, no data.dir, or nothing usable there.
    """
    if data.name == "digits":
        return Digits(split)
    if data.name == "folder":
        if not data.dir:
            raise UserError("data.name is folder but data.dir is empty: add --config.data.dir=FOLDER.")
        return ImageFolder(data.dir, split)
    known = ("digits", "folder")
    raise UserError(
        f"data.name is {data.name!r}{nearest(data.name, known)} Give digits, or folder with data.dir."
    )
