"""Turns the "python version" of CIFAR-10 into an image folder: cifar10_folder.py cifar-10-batches-py CIFAR10."""

import argparse
import collections
import pathlib
import pickle

from PIL import Image

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("source", type=pathlib.Path)
parser.add_argument("target", type=pathlib.Path)
paths = parser.parse_args()

names = pickle.loads((paths.source / "batches.meta").read_bytes())["label_names"]
count: collections.Counter[tuple[str, int]] = collections.Counter()
for file in [*sorted(paths.source.glob("data_batch_*")), paths.source / "test_batch"]:
    split = "test" if file.name == "test_batch" else "train"
    batch = pickle.loads(file.read_bytes(), encoding="bytes")
    for label, pixels in zip(batch[b"labels"], batch[b"data"], strict=True):
        path = paths.target / split / names[label] / f"{count[split, label]:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.reshape(3, 32, 32).transpose(1, 2, 0)).save(path)
        count[split, label] += 1
