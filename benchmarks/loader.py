"""How fast one core of the host makes training images, next to plain Pillow and to timm's transform.

    python -m benchmarks.loader --images=DIR [--peer=PYTHON] [--seconds=10] [--rounds=3] [--json=FILE]

DIR holds JPEG photos at any depth, as ImageNet's. Every program sees the same ones, held in memory, in a
process of its own, and the programs take turns; medians over the rounds. What counts are the ratios: the
rates move with the machine. PYTHON is an interpreter with PyTorch and timm.
"""

import argparse
import contextlib
import io
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
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
RATIOS = [
    ("repeats", "pillow", 1.4),
    ("repeats", "timm", 1.8),
    ("worker2", "worker1", 1.8),
]
TIMM = """
import io, sys, time
from pathlib import Path
import torch
try:
    import timm_here  # beside a build of PyTorch that misses torchvision's operators
except ImportError:
    pass
from PIL import Image
from timm.data import create_transform
torch.set_num_threads(1)
transform = create_transform(
    SIZE, is_training=True, interpolation="bicubic", auto_augment="rand-m9-mstd0.5-inc1"
)
files = [path.read_bytes() for path in map(Path, sys.stdin.read().split("\\n"))]
done, began = 0, time.perf_counter()
while time.perf_counter() - began < SECONDS:
    try:
        transform(Image.open(io.BytesIO(files[done % len(files)])).convert("RGB"))
    except ValueError:  # posterize to 0 bits, which Pillow refuses
        pass
    done += 1
print(done / (time.perf_counter() - began))
"""


class InMemory:
    """A source of images held in memory."""

    def __init__(self, images):
        self.images = images
        self.names = [str(number) for number in range(len(images))]
        self.labels = np.zeros(len(images), np.int32)

    def __getitem__(self, index):
        return self.images[index]


def examples(images, repeats, size):
    """The training examples of these images."""
    return TrainExample(InMemory(images), Slots(np.arange(len(images)), 0, repeats), (size, size), "resized")


def pillow(files, rng):
    """One image after the other, as everybody does it."""
    while True:
        for file in files:
            image = Image.open(io.BytesIO(file)).convert("RGB")
            crop = image.crop(random_resized_crop_box(*image.size, rng))
            np.asarray(crop.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
            yield 1


def in_this_process(files, repeats):
    """Whole batches, in one thread."""
    example, step = examples(files, repeats, SIZE), 0
    while True:
        example(range(step * BATCH, (step + 1) * BATCH))
        step += 1
        yield BATCH


def in_workers(files, count):
    """Whole batches from worker processes."""
    with contextlib.closing(
        batches(examples(files, 3, SIZE), batch_size=BATCH, start=0, stop=10**6, workers=count)
    ) as stream:
        for batch in stream:
            del batch  # its shared memory, before the stream is closed
            yield BATCH


def rate(program, files, seconds):
    """Images/s of one program, once it is under way."""
    if program == "pillow":
        stream = pillow(files, np.random.default_rng(0))
    elif program.startswith("worker"):
        stream = in_workers(files, int(program[-1]))
    else:
        stream = in_this_process(files, 3 if program == "repeats" else 1)
    for _ in range(8):
        next(stream)
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        done += next(stream)
    result = done / (time.perf_counter() - began)
    stream.close()
    return result


def memory(count):
    """Resident MB of two workers and this process after a tenth of `count` batches, and at the end."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), np.uint8)
    seen = []
    stream = batches(examples(noise, 3, 32), batch_size=16, start=0, stop=count, workers=2)
    for step, _ in enumerate(stream):
        if step in (count // 10, count - 100):
            processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
            seen.append(sum(process.memory_info().rss for process in processes) / 1e6)
    return seen


def run_alone(program, paths, seconds, peer):
    """Images/s of a program in a process of its own."""
    if program == "timm":
        command = [peer, "-c", TIMM.replace("SIZE", str(SIZE)).replace("SECONDS", str(seconds))]
    else:
        command = [sys.executable, "-m", "benchmarks.loader", f"--program={program}", f"--seconds={seconds}"]
    done = subprocess.run(command, input="\n".join(paths), text=True, stdout=subprocess.PIPE, check=True)
    return float(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", help="folder of JPEG photos")
    parser.add_argument("--peer", help="a Python with PyTorch and timm, to compare with")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=10_000, help="for the memory test")
    parser.add_argument("--gpu_rate", type=float, help="images/s of training, to say how many cores feed it")
    parser.add_argument("--json", help="file for the results")
    parser.add_argument("--program", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.program:
        files = [Path(path).read_bytes() for path in sys.stdin.read().split("\n")]
        print(rate(options.program, files, options.seconds))
        return
    paths = sorted(
        str(p) for p in Path(options.images or "").rglob("*") if p.suffix.lower() in (".jpg", ".jpeg")
    )
    if not options.images or not paths:
        parser.error("--images must be a folder of JPEG photos")
    names = [name for name in PROGRAMS if name != "timm" or options.peer]
    rates = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            rates[name].append(run_alone(name, paths, options.seconds, options.peer))
    median = {name: statistics.median(values) for name, values in rates.items()}
    print(f"{len(paths)} photos to {SIZE} x {SIZE}, {options.rounds} rounds of {options.seconds:g} s")
    for name in names:
        print(f"{median[name]:8.0f} images/s  {PROGRAMS[name]}")
    ratios = {f"{a}/{b}": median[a] / median[b] for a, b, _ in RATIOS if a in median and b in median}
    for a, b, target in RATIOS:
        if f"{a}/{b}" in ratios:
            print(f"{ratios[f'{a}/{b}']:8.2f} x  {PROGRAMS[a]} / {PROGRAMS[b]}; expected {target} or more")
    if options.gpu_rate:
        cores = options.gpu_rate / median["repeats"]
        print(f"{cores:8.1f} cores feed a GPU that trains {options.gpu_rate:g} images/s")
    early, late = memory(options.batches)
    print(f"{early:.0f} MB after {options.batches // 10:,} batches, {late:.0f} MB after {options.batches:,}")
    if options.json:
        results = dict(rates=rates, ratios=ratios, memory_mb=[early, late])
        Path(options.json).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
