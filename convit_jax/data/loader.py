"""Which example goes into which slot, and the batches of uint8 images that the host ships.

A training run is a sequence of slots: slot = step * batch_size + row. What a slot shows is a pure
function of (seed, slot), so a run continues exactly from any step, with any number of loader
workers, and several processes share the slots of a step by rows. Grain runs it.
"""

import dataclasses
import functools
import io
import math
import multiprocessing
import os
import signal
import threading

import grain
import numpy as np
from absl import flags
from PIL import Image, UnidentifiedImageError

from convit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Slots:
    """The order of training: indices of the subset, shuffled anew each epoch.

    repeats > 1 is repeated augmentation (DeiT's RASampler): an epoch still shows about as many
    images as the subset has, each of them `repeats` times in a row, so that only a part of the
    subset is shown; the epoch is cut to a multiple of 256 images.
    """

    indices: np.ndarray
    seed: int
    repeats: int = 1

    @functools.cached_property
    def epoch_length(self):
        """Images shown in one epoch."""
        count = len(self.indices)
        return count if self.repeats == 1 or count < 256 else count // 256 * 256

    def example(self, slot):
        """Index into the source for a global slot number."""
        epoch, position = divmod(slot, self.epoch_length)
        return int(self.indices[_order(len(self.indices), self.seed, epoch)[position // self.repeats]])


@functools.lru_cache(maxsize=3)
def _order(count, seed, epoch):
    """A permutation of range(count) from raw Philox bits, which no version of NumPy will change."""
    return np.argsort(np.random.Philox(key=[seed, epoch]).random_raw(count), kind="stable")


def decode(record, name):
    """A record of a source as a PIL image in RGB, or as the uint8 array that it already is."""
    if isinstance(record, np.ndarray):
        return record
    try:
        with Image.open(io.BytesIO(record)) as image:
            if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip at 255
                image = Image.fromarray(np.clip(np.asarray(image) >> 8, 0, 255).astype(np.uint8))
            elif image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")  # else Pillow warns
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "of no known format" if isinstance(error, UnidentifiedImageError) else error
        raise UserError(f"cannot decode the image {name} ({reason}): replace or remove the file.") from error


def random_resized_crop_box(width, height, rng, *, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    """(left, top, right, bottom) of torchvision's RandomResizedCrop in an image of width x height pixels."""
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = width, height  # no luck: the central crop nearest in shape
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def centre_crop_box(width, height, size, crop_ratio):
    """Box in the original image of: resize the short side to size / crop_ratio, centre crop size (h, w)."""
    scale = min(width / size[1], height / size[0]) * crop_ratio
    w, h = min(size[1] * scale, width), min(size[0] * scale, height)  # rounding may exceed the image
    return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2


def fit(image, size, box):
    """Cut box out of an image and resize it to size (h, w), bicubic with antialiasing: uint8 [h, w, 3]."""
    width, height = _width_height(image)
    if (height, width) == tuple(size) and tuple(box) == (0, 0, width, height):
        return np.asarray(image)
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    return np.asarray(image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box))


@dataclasses.dataclass(frozen=True)
class TrainExample:
    """Slot -> {"image": uint8 [h, w, 3], "label": int32}, a pure function of (seed, slot)."""

    source: object
    slots: Slots
    size: tuple
    crop: str  # "resized": random resized crop here; "pad": whole images, shifted later on the device

    def __call__(self, slot):
        index = self.slots.example(slot)
        image = decode(self.source[index], self.source.names[index])
        if self.crop == "resized":
            rng = np.random.Generator(np.random.Philox(key=[self.slots.seed, slot], counter=1 << 128))
            box = random_resized_crop_box(*_width_height(image), rng)
        else:
            box = (0, 0, *_width_height(image))
        return {"image": fit(image, self.size, box), "label": self.source.labels[index]}


@dataclasses.dataclass(frozen=True)
class EvalExample:
    """Slot -> the slot-th image of the subset, centre-cropped; past the end an empty one, valid False."""

    source: object
    indices: np.ndarray
    size: tuple
    crop_ratio: float

    def __call__(self, slot):
        if slot >= len(self.indices):
            return {"image": np.zeros((*self.size, 3), np.uint8), "label": np.int32(0), "valid": np.False_}
        index = self.indices[slot]
        image = decode(self.source[index], self.source.names[index])
        width, height = _width_height(image)
        box = centre_crop_box(width, height, self.size, self.crop_ratio)
        return {"image": fit(image, self.size, box), "label": self.source.labels[index], "valid": np.True_}


def _width_height(image):
    return (image.shape[1], image.shape[0]) if isinstance(image, np.ndarray) else image.size


@dataclasses.dataclass(frozen=True)
class _Row:
    """The n-th example of this process -> its example by global slot."""

    example: object
    batch_size: int
    process: int
    processes: int

    def __call__(self, n):
        local = self.batch_size // self.processes
        step, row = divmod(n, local)
        return self.example(step * self.batch_size + self.process * local + row)


def batches(example, *, batch_size, start, stop, workers=0, process=0, processes=1):
    """Iterator over the batches of steps start .. stop - 1, this process's rows of them.

    Args:
      example: TrainExample or EvalExample.
      batch_size: global, over all processes. start, stop: steps.
      workers: loader processes; 0 loads in threads of this one. The batches do not depend on it.
      process, processes: which rows are this process's.

    Yields:
      A dict of arrays with a leading axis of batch_size / processes.
    """
    local = batch_size // processes
    dataset = grain.MapDataset.range(stop * local).map(_Row(example, batch_size, process, processes))
    dataset = dataset.batch(local)[start:]
    threads = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
    dataset = dataset.to_iter_dataset(threads)
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain reads flags of its own; we may be in a notebook
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2),
            worker_init_fn=_prepare_worker,
        )
    return iter(dataset)


def _prepare_worker(worker, workers):
    """Leave Ctrl-C, which reaches every process of the terminal, to the main one; do not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
