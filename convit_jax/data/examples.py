"""Which image fills which row of a batch, and the uint8 batches that the host makes from them.

Training is a sequence of slots: slot = step * batch_size + row. The image in a slot and its random crop are a
pure function of (seed, slot). A run therefore continues exactly from any step, with any number of loader
workers, and several processes can share the rows of a step.

The arrays of a batch are "image" uint8 [n, height, width, 3], "label" int32 [n] and "unreadable" int64 [n], the
index of the image that could not be read, or -1; in evaluation also "valid" bool [n]. If the device crops and resizes,
those of canvas.py replace "image".
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from convit_jax.data.canvas import CanvasRows, HostRows
from convit_jax.data.images import Axis, View, centre_view, decode, random_resized_crop_box
from convit_jax.data.index import Source
from convit_jax.errors import UserError

TRIES = 10  # images tried in place of an unreadable one before the run fails
MANY = 1000  # rows, to judge whether images fit on their canvases

Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Slots:
    """The order of training images: the subset, reshuffled every epoch.

    With repeats > 1 (repeated augmentation, DeiT's `RASampler`) each image fills `repeats` slots in a row. An
    epoch keeps its length, so it shows only a part of the subset. It is cut to a multiple of 256 images.
    """

    indices: np.ndarray  # of the subset in the source, ascending
    seed: int
    repeats: int = 1

    @functools.cached_property
    def epoch_length(self) -> int:
        """Slots in one epoch."""
        count = len(self.indices)
        return count if self.repeats == 1 or count < 256 else count // 256 * 256

    def example(self, slot: int) -> int:
        """Returns the index into the source for a slot."""
        epoch, position = divmod(slot, self.epoch_length)
        return int(self.indices[_order(len(self.indices), self.seed, epoch)[position // self.repeats]])

    def most_images(self, count: int) -> int:
        """Returns the largest number of images in `count` neighbouring slots; at the end of an epoch one may be cut."""
        ends = math.ceil((count - 1) / self.epoch_length) if self.epoch_length % self.repeats else 0
        return min(count, 1 + math.ceil((count - 1) / self.repeats) + ends)


@functools.lru_cache(maxsize=3)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of range(count) from raw Philox bits, which are the same in every version of NumPy."""
    return np.argsort(np.random.Philox(key=[seed, epoch]).random_raw(count), kind="stable")


@dataclass(frozen=True)
class TrainExample:
    """Makes training rows. The next readable image of the subset, usually of its class, replaces an unreadable one."""

    source: Source
    slots: Slots
    size: tuple[int, int]  # (height, width)
    crop: str  # "resized": random resized crop; "pad": the centre, which the device shifts later
    interpolation: str = "bicubic"  # a Pillow filter
    canvas: int = 0  # side of the canvases from which the device crops and resizes (bicubic only); 0: the host does
    group: int = 1  # rows that share canvases

    def __call__(self, slots: Sequence[int]) -> Batch:
        """Returns one row for each slot; raises UserError if `TRIES` images in a row are unreadable."""
        batch, rows = _no_labels(len(slots)), self.rows(len(slots))
        for wanted, found in itertools.groupby(range(len(slots)), lambda row: self.slots.example(slots[row])):
            together = [*found]  # the repeats of an image are neighbours: decode it once
            image, shown = self._readable(wanted)
            rows.put(together, image, [self._view(image, slots[row]) for row in together])
            batch["label"][together] = self.source.labels[shown]
            batch["unreadable"][together] = -1 if shown == wanted else wanted
        return batch | rows.arrays()

    def rows(self, count: int) -> HostRows | CanvasRows:
        """Returns `count` black rows."""
        if not self.canvas:
            return HostRows(count, self.size, self.interpolation)
        most = self.slots.most_images(self.group)
        return CanvasRows(count, self.size, side=self.canvas, group=self.group, canvases=most)

    def _view(self, image: np.ndarray, slot: int) -> View:
        if self.crop == "pad":
            return centre_view(image, self.size, 1.0)
        height, width, _ = image.shape
        rng = np.random.Generator(np.random.Philox(key=[self.slots.seed, slot], counter=1 << 128))
        left, top, right, bottom = random_resized_crop_box(width, height, rng)
        return Axis(top, bottom - top, self.size[0]), Axis(left, right - left, self.size[1])

    def _readable(self, wanted: int) -> tuple[np.ndarray, int]:
        """The image `wanted`, or the first readable one after it in the subset, and its index."""
        subset = self.slots.indices
        positions = np.searchsorted(subset, wanted) + np.arange(TRIES)
        for index in subset[positions % len(subset)].tolist():
            try:
                return _decoded(self.source, index), index
            except UserError as error:
                reason = error
        raise reason


@dataclass(frozen=True)
class EvalExample:
    """Makes the rows of an evaluation: slot i shows the centre of the i-th image of the subset.

    Slots past the end and unreadable images give black rows that are not valid.
    """

    source: Source
    indices: np.ndarray  # of the subset in the source
    size: tuple[int, int]  # (height, width)
    crop_ratio: float  # share of the resized image's short side that is shown
    interpolation: str = "bicubic"  # a Pillow filter
    canvas: int = 0  # side of the canvases from which the device crops and resizes (bicubic only); 0: the host does

    def __call__(self, slots: Sequence[int]) -> Batch:
        """Returns one row for each slot."""
        batch, rows = _no_labels(len(slots)) | {"valid": np.zeros(len(slots), bool)}, self.rows(len(slots))
        for row, slot in enumerate(slots):
            if slot >= len(self.indices):
                break
            index = int(self.indices[slot])
            try:
                image = _decoded(self.source, index)
                rows.put([row], image, [centre_view(image, self.size, self.crop_ratio)])
                batch["label"][row] = self.source.labels[index]
                batch["valid"][row] = True
            except UserError:
                batch["unreadable"][row] = index
        return batch | rows.arrays()

    def rows(self, count: int) -> HostRows | CanvasRows:
        """Returns `count` black rows."""
        if not self.canvas:
            return HostRows(count, self.size, self.interpolation)
        return CanvasRows(count, self.size, side=self.canvas, group=1, canvases=1)


class Unreadable:
    """Reports each unreadable image of a source once with `say`, and stops the run after `limit` images."""

    def __init__(self, source: Source, limit: int, say: Callable[[str], None]) -> None:
        self.source, self.limit, self.say = source, limit, say
        self.seen: set[int] = set()  # indices
        self.rows = self.too_large = 0  # rows so far, and those whose image did not fit on a canvas
        self._warned = False
        with contextlib.suppress(UserError):
            _decoded(source, 0)  # warns of images without contrast, which the workers of a loader do not

    def take(self, batch: Batch) -> Batch:
        """Returns a batch without its remarks; raises UserError if more than `limit` images are unreadable."""
        batch = dict(batch)
        self.rows += len(batch["label"])
        self.too_large += int(batch.pop("too_large", np.False_).sum())
        if not self._warned and 2 * self.too_large > self.rows > MANY:
            self._warned = True
            self.say("Most images are too large for their canvas: set data.resize=host, or raise data.canvas.")
        for index in sorted({*batch.pop("unreadable").tolist()} - {-1} - self.seen):
            self.seen.add(index)
            try:
                _decoded(self.source, index)
                reason = f"the image {self.source.name(index)} could be read only the second time: check the disk."
            except UserError as error:
                reason = str(error)
            if len(self.seen) > self.limit:
                raise UserError(f"{reason} That is one more than data.max_unreadable={self.limit} allows.")
            self.say(f"{reason} The run continues ({len(self.seen)} of at most {self.limit} such images).")
        return batch


def _decoded(source: Source, index: int) -> np.ndarray:
    return decode(source[index], source.name(index))


def _no_labels(rows: int) -> Batch:
    return {"label": np.zeros(rows, np.int32), "unreadable": np.full(rows, -1, np.int64)}
