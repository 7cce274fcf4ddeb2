"""Statistics of training images after the whole DeiT recipe, and of timm's pipeline on the same photos.

    python -m benchmarks.augment_statistics --images=DIR [--peer=PYTHON] [--repeats=20]

DIR holds photos at any depth, each of which is taken so many times; PYTHON is an interpreter with PyTorch and
timm. Of each channel, normalised, before mixup.
"""

import argparse
import inspect
import subprocess
from pathlib import Path

import jax
import numpy as np

from benchmarks.loader import examples
from configs import default
from convit_jax.data.augment import augment

BATCH = 80
PEER = """
import random, sys, numpy as np, torch
try:
    import timm_here  # mends torchvision where its operators are missing
except ImportError:
    pass
from PIL import Image, ImageOps
from timm.data import create_transform
posterize = ImageOps.posterize  # newer Pillow refuses the 0 bits that timm may ask for
ImageOps.posterize = lambda image, bits: posterize(image, bits) if bits else image.point([0] * 768)
random.seed(0), np.random.seed(0), torch.manual_seed(0), torch.set_num_threads(1)
transform = create_transform(
    224, is_training=True, auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic",
    re_prob=0.25, re_mode="pixel", re_count=1,
)
photos = [Image.open(path).convert("RGB") for path in sys.argv[2:]]
repeats = range(int(sys.argv[1]))
report(transform(photo).numpy().transpose(1, 2, 0) for _ in repeats for photo in photos)
"""


def report(images):
    """Print statistics of each channel of images [H, W, 3]."""
    rng, means, squares, lows, highs, pixels = np.random.default_rng(1), [], [], [], [], []
    for image in images:
        values = image.reshape(-1, 3).astype(np.float64)
        means.append(values.mean(0))
        squares.append((values**2).mean(0))
        lows.append(values.min(0))
        highs.append(values.max(0))
        pixels.append(values[rng.integers(0, len(values), 2000)])
    mean = np.mean(means, 0)
    rows = {
        "mean": mean,
        "its standard error": np.std(means, 0) / np.sqrt(len(means)),
        "std": np.sqrt(np.mean(squares, 0) - mean**2),
        "min": np.min(lows, 0),
        "max": np.max(highs, 0),
    }
    for share in (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99):
        rows[f"quantile {share}"] = np.quantile(np.concatenate(pixels), share, axis=0)
    for name, values in rows.items():
        print(f"{name:20s}" + "".join(f"{value:9.4f}" for value in values))


def ours(paths, repeats):
    """Every photo `repeats` times through the host's crop and the device's augmentation, one by one."""
    config = default.get_config()
    example = examples([path.read_bytes() for path in paths], 1, config.model.image_size)

    @jax.jit
    def run(images, key):
        return augment(images, key, config.augment, mean=config.data.mean, std=config.data.std)

    for first in range(0, repeats * len(paths), BATCH):
        batch = example(range(first, min(first + BATCH, repeats * len(paths))))
        yield from np.asarray(run(batch["image"], jax.random.key(first)))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", required=True, type=Path)
    parser.add_argument("--peer")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    paths = sorted(path for path in options.images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    print(f"here, {len(paths)} photos, {options.repeats} times")
    report(ours(paths, options.repeats))
    if options.peer:
        print("timm", flush=True)
        code = "import numpy as np\n" + inspect.getsource(report) + PEER
        subprocess.run([options.peer, "-c", code, str(options.repeats), *map(str, paths)], check=True)


if __name__ == "__main__":
    main()
