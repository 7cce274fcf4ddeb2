"""Compares how fast one core makes training images with plain Pillow and with timm's transform.

    python -m benchmarks.loader --images=DIR [--peer=PYTHON] [--seconds=10] [--rounds=3]

DIR holds JPEG photos at any depth, as ImageNet's. Every program reads the same photos from memory in its own
process, and the programs take turns; medians over the rounds. The ratios count: rates move with the machine.
PYTHON is an interpreter with PyTorch and timm.
"""

import argparse
import contextlib
import io
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from convit_jax.data.examples import Slots, TrainExample
from convit_jax.data.images import random_resized_crop_box
from convit_jax.data.loader import batches

SIZE, BATCH = 224, 96
PROGRAMS = {
    "pillow": "plain Pillow: decode, crop, bicubic",
    "once": "ours, no repeats",
    "repeats": "ours, three repeats",
    "worker1": "ours, three repeats, one worker process",
    "worker2": "ours, three repeats, two worker processes",
    "timm": "timm: decode, crop, flip, RandAugment, tensor, normalise",
}
RATIOS = [("repeats", "pillow"), ("repeats", "timm"), ("worker2", "worker1")]
TIMM = """
import io, sys, time
from pathlib import Path
import torch
try: import timm_here  # for a build of PyTorch without torchvision's operators
except ImportError: pass
from PIL import Image
from timm.data import create_transform
torch.set_num_threads(1)
size, seconds = int(sys.argv[1]), float(sys.argv[2])
policy = "rand-m9-mstd0.5-inc1"
transform = create_transform(size, is_training=True, interpolation="bicubic", auto_augment=policy)
files = [path.read_bytes() for path in map(Path, sys.stdin.read().split("\\n"))]
done, began = 0, time.perf_counter()
while time.perf_counter() - began < seconds:
    try: transform(Image.open(io.BytesIO(files[done % len(files)])).convert("RGB"))
    except ValueError: pass  # posterize to 0 bits, which Pillow refuses
    done += 1
print(done / (time.perf_counter() - began))
"""


class InMemory(list):
    """A source of encoded images in memory."""

    def __init__(self, images):
        super().__init__(images)
        self.labels = np.zeros(len(images), np.int32)

    def name(self, number):
        return str(number)


def pillow(files):
    """Yields 1 after each image."""
    rng = np.random.default_rng(0)
    while True:
        for file in files:
            image = Image.open(io.BytesIO(file)).convert("RGB")
            crop = image.crop(random_resized_crop_box(*image.size, rng))
            np.asarray(crop.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
            yield 1


def ours(files, repeats, workers):
    """Yields BATCH after each batch, made in this thread or in worker processes."""
    slots = Slots(np.arange(len(files)), 0, repeats)
    example = TrainExample(InMemory(files), slots, (SIZE, SIZE), "resized")
    if not workers:
        step = 0
        while True:
            example(range(step * BATCH, (step + 1) * BATCH))
            step += 1
            yield BATCH
    stream = batches(example, batch_size=BATCH, start=0, stop=10**6, workers=workers)
    with contextlib.closing(stream):
        for batch in stream:
            del batch  # its shared memory, before the stream is closed
            yield BATCH


def rate(program, files, seconds):
    """Returns the images/s of a program, after eight items to warm up."""
    workers = int(program[-1]) if program.startswith("worker") else 0
    stream = pillow(files) if program == "pillow" else ours(files, 1 if program == "once" else 3, workers)
    with contextlib.closing(stream):
        for _ in range(8):
            next(stream)
        done, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            done += next(stream)
        return done / (time.perf_counter() - began)


def run_alone(program, paths, seconds, peer):
    """Returns the images/s of a program in its own process."""
    command = [sys.executable, "-m", "benchmarks.loader", f"--program={program}", f"--seconds={seconds}"]
    if program == "timm":
        command = [peer, "-c", TIMM, str(SIZE), str(seconds)]
    done = subprocess.run(command, input="\n".join(paths), text=True, stdout=subprocess.PIPE, check=True)
    return float(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", default="", help="folder of JPEG photos")
    parser.add_argument("--peer", help="a Python with PyTorch and timm, to compare with")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--program", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.program:
        files = [Path(path).read_bytes() for path in sys.stdin.read().split("\n")]
        print(rate(options.program, files, options.seconds))
        return
    paths = sorted(str(p) for p in Path(options.images).rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    if not options.images or not paths:
        parser.error("--images must be a folder of JPEG photos")
    rates = {name: [] for name in PROGRAMS if name != "timm" or options.peer}
    for _ in range(options.rounds):
        for name in rates:
            rates[name].append(run_alone(name, paths, options.seconds, options.peer))
    print(f"{len(paths)} photos to {SIZE} x {SIZE}, {options.rounds} rounds of {options.seconds:g} s")
    for name in rates:
        print(f"{statistics.median(rates[name]):8.0f} images/s  {PROGRAMS[name]}")
    for a, b in RATIOS:
        if a in rates and b in rates:
            ratio = statistics.median(x / y for x, y in zip(rates[a], rates[b], strict=True))
            print(f"{ratio:8.2f} x  {PROGRAMS[a]} / {PROGRAMS[b]}")


if __name__ == "__main__":
    main()
