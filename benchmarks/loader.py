"""Compares how fast one core makes images: the host resizes, or only decodes; plain Pillow; timm's transform.

    python -m benchmarks.loader --images=DIR [--peer=PYTHON] [--seconds=10] [--rounds=3]

DIR holds JPEG photos at any depth, as ImageNet's. Every program reads the same photos from memory in its own
process, and the programs take turns; medians over the rounds. The ratios count: rates move with the machine. A second
is one of processor time, or of time for programs with worker processes.
PYTHON is an interpreter with PyTorch and timm.
"""

import argparse
import contextlib
import io
import itertools
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from convit_jax.data.examples import EvalExample, Slots, TrainExample
from convit_jax.data.images import random_resized_crop_box
from convit_jax.data.loader import batches

SIZE, BATCH, CANVAS = 224, 96, 512
PROGRAMS = {
    "pillow": "plain Pillow: decode, crop, bicubic",
    "once": "host resizes, no repeats",
    "repeats": "host resizes, three repeats",
    "device": "device resizes, three repeats",
    "worker1": "device resizes, three repeats, one worker process",
    "worker2": "device resizes, three repeats, two worker processes",
    "evaluate": "host resizes, evaluation",
    "evaluate_device": "device resizes, evaluation",
    "timm": "timm: decode, crop, flip, RandAugment, tensor, normalise",
}
RATIOS = [
    *(("repeats", "pillow"), ("repeats", "timm"), ("device", "timm"), ("device", "repeats")),
    *(("evaluate_device", "evaluate"), ("worker2", "worker1")),
]
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
done, began = 0, time.process_time()
while time.process_time() - began < seconds:
    try: transform(Image.open(io.BytesIO(files[done % len(files)])).convert("RGB"))
    except ValueError: pass  # posterize to 0 bits, which Pillow refuses
    done += 1
print(done / (time.process_time() - began))
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


def ours(files, program):
    """Yields BATCH after each batch, made in this thread or in worker processes."""
    source, indices, size = InMemory(files), np.arange(len(files)), (SIZE, SIZE)
    if program.startswith("evaluate"):
        canvas = CANVAS * 3 // 4 if program == "evaluate_device" else 0
        example = EvalExample(source, np.resize(indices, 10**6), size, 0.875, canvas=canvas)
    else:
        canvas = 0 if program in ("once", "repeats") else CANVAS
        slots = Slots(indices, 0, 1 if program == "once" else 3)
        example = TrainExample(source, slots, size, "resized", canvas=canvas, group=BATCH)
    if not program.startswith("worker"):
        for first in itertools.count(0, BATCH):
            example(range(first, first + BATCH))
            yield BATCH
    stream = batches(example, batch_size=BATCH, start=0, stop=10**6, workers=int(program[-1]))
    with contextlib.closing(stream):
        for batch in stream:
            del batch  # its shared memory, before the stream is closed
            yield BATCH


def rate(program, files, seconds):
    """Returns the images/s of a program, after some items to warm up."""
    with contextlib.closing(pillow(files) if program == "pillow" else ours(files, program)) as stream:
        for _ in range(4):
            next(stream)
        clock = time.perf_counter if program.startswith("worker") else time.process_time
        done, began = 0, clock()
        while clock() - began < seconds:
            done += next(stream)
        return done / (clock() - began)


def run_alone(program, paths, seconds, peer):
    """Returns the images/s of a program in its own process."""
    command = [sys.executable, "-m", "benchmarks.loader", f"--program={program}", f"--seconds={seconds}"]
    if program == "timm":
        command = [peer, "-c", TIMM, str(SIZE), str(seconds)]
    done = subprocess.run(command, input="\n".join(paths), text=True, stdout=subprocess.PIPE, check=True)
    return float(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", help="folder of JPEG photos")
    parser.add_argument("--peer", help="a Python with PyTorch and timm, to compare with")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--program", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.program:
        files = [Path(path).read_bytes() for path in sys.stdin.read().split("\n")]
        print(rate(options.program, files, options.seconds))
        return
    photos = Path(options.images).rglob("*") if options.images else []
    paths = sorted(str(path) for path in photos if path.suffix.lower() in (".jpg", ".jpeg"))
    if not paths:
        parser.error("--images must be a folder of JPEG photos")
    rates = {name: [] for name in PROGRAMS if name != "timm" or options.peer}
    for _ in range(options.rounds):
        for name in rates:
            rates[name].append(run_alone(name, paths, options.seconds, options.peer))
            print(f"{rates[name][-1]:8.0f} images/s  {PROGRAMS[name]}", flush=True)
    print(f"{len(paths)} photos to {SIZE} x {SIZE}, {options.rounds} rounds of {options.seconds:g} s")
    for name in rates:
        print(f"{statistics.median(rates[name]):8.0f} images/s  {PROGRAMS[name]}")
    for a, b in RATIOS:
        if a in rates and b in rates:
            ratios = [x / y for x, y in zip(rates[a], rates[b], strict=True)]
            spread = f"({min(ratios):.2f} to {max(ratios):.2f})"
            print(f"{statistics.median(ratios):8.2f} x {spread}  {PROGRAMS[a]} / {PROGRAMS[b]}")


if __name__ == "__main__":
    main()
