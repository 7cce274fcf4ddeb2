"""Rows of a batch: images that the host crops and resizes, or canvases from which the device does (resize.py).

The arrays of the second kind are "canvas" uint8 [groups, canvases, side, side, 3], "on" int32 [n] and "view"
int32 [n, 2, 4]. The n rows are divided into groups of neighbours, one for each device, which has the canvases of its
rows. A row shows a view (`images.View`) of the canvas number `on` of its group. "too_large" bool [n] marks the
rows whose image does not fit on a canvas: the host has resized them.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from grain.multiprocessing import SharedMemoryArray, SharedMemoryArrayMetadata

from convit_jax.data import images
from convit_jax.data.images import Axis, View, is_long, show


class HostRows:
    """Rows that the host crops and resizes to size (height, width); black at first."""

    def __init__(self, rows: int, size: tuple[int, int], interpolation: str) -> None:
        self._images = _black((rows, *size, 3))
        self._size, self._interpolation = size, interpolation

    def put(self, rows: Sequence[int], image: np.ndarray, views: Sequence[View]) -> None:
        """Shows views of an image, uint8 [height, width, 3], in rows."""
        for row, view in zip(rows, views, strict=True):
            self._images[row] = show(image, self._size, view, self._interpolation)

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns "image"."""
        return {"image": self._images}


class CanvasRows:
    """Rows that the device crops and resizes; black at first. Rows with the same image share a canvas."""

    def __init__(self, rows: int, size: tuple[int, int], *, side: int, group: int, canvases: int) -> None:
        """group: rows of a group; canvases: of a group, for the largest number of images in it."""
        black = [Axis(0, length, length) for length in size]
        self._canvas = _black((rows // group, canvases, side, side, 3))
        self._on = np.zeros(rows, np.int32)
        self._view = np.tile(np.array(black, np.int32), (rows, 1, 1))
        self._too_large = np.zeros(rows, bool)
        self._size, self._group, self._columns = size, group, side // size[1]
        self._room = side // size[0] * self._columns  # images of this size on one canvas
        self._used = [0] * (rows // group)  # canvases

    def put(self, rows: Sequence[int], image: np.ndarray, views: Sequence[View]) -> None:
        """Shows views of an image, uint8 [height, width, 3], in ascending rows, once for each image."""
        for group, found in itertools.groupby(zip(rows, views, strict=True), lambda pair: pair[0] // self._group):
            pairs = [*found]
            for first in range(0, len(pairs), self._room):
                self._place(group, image, pairs[first : first + self._room])

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns "canvas", "on", "view" and "too_large"."""
        return {"canvas": self._canvas, "on": self._on, "view": self._view, "too_large": self._too_large}

    def _place(self, group: int, image: np.ndarray, pairs: Sequence[tuple[int, View]]) -> None:
        """Puts what some rows of a group need of an image on the next canvas."""
        rows, views = [row for row, _ in pairs], [view for _, view in pairs]
        canvas = self._canvas[group, self._used[group]]
        (top, bottom), (left, right) = (_needed([view[n] for view in views], self._size[n]) for n in range(2))
        if max(bottom - top, right - left) > len(canvas) or any(map(is_long, views)):
            self._too_large[rows] = True
            views = self._resize(canvas, image, views)
        else:
            canvas[: bottom - top, : right - left] = image[top:bottom, left:right]
            views = [(y._replace(start=y.start - top), x._replace(start=x.start - left)) for y, x in views]
        self._on[rows], self._view[rows] = self._used[group], views
        self._used[group] += 1

    def _resize(self, canvas: np.ndarray, image: np.ndarray, views: list[View]) -> list[View]:
        """Resizes the views of an image on the host, puts them side by side and returns them as views of the canvas."""
        (h, w), placed = self._size, []
        for number, view in enumerate(views):
            top, left = number // self._columns * h, number % self._columns * w
            canvas[top : top + h, left : left + w] = show(image, self._size, view)
            placed.append((Axis(top, h, h), Axis(left, w, w)))
        return placed


class _Shared(SharedMemoryArray):
    """An array that frees its shared memory when it is deleted, unless Grain has asked for `metadata` to send it."""

    @property
    def metadata(self) -> SharedMemoryArrayMetadata:
        self._unlink_on_del = False
        return super().metadata


def _black(shape: tuple[int, ...]) -> np.ndarray:
    """uint8 zeros; in a worker of the loader in shared memory, so that Grain does not copy them there."""
    if not images.in_worker:
        return np.zeros(shape, np.uint8)
    array = _Shared(shape, np.uint8)
    array.unlink_on_del()
    return array


def _needed(axes: list[Axis], shown: int) -> tuple[int, int]:
    """The pixels [begin, end) of an image that are needed to show this number of pixels of each axis."""
    begins, ends = [], []
    for start, length, resized, first in axes:
        scale = length / resized
        reach = 2 * max(scale, 1)  # of the bicubic filter
        begins.append(start + max(0, math.floor((first + 0.5) * scale - reach)))
        ends.append(start + min(length, math.ceil((first + shown - 0.5) * scale + reach)))
    return min(begins), max(ends)
