"""A tensor that stays in its file until a model or another file takes it, a few rows at a time.

Whoever takes it has one pass over the bytes: rows are read into memory that fits the processor's cache,
go into the checksum there, and from there, transposed or not, to their place. No second copy of the
weights exists. The file stays open as long as one of its tensors is there.
"""

import os
import weakref
import zlib

import numpy as np

from convit_jax.errors import UserError, explained
from convit_jax.weights.tensors import DAMAGED, read_into

PIECE = 2**19  # bytes; more than in tensors.py, so that more rows of a matrix are transposed at a time


class Held:
    """A file of its own descriptor, closed with the last tensor that holds it."""

    def __init__(self, path, file):
        self.path, self.descriptor = path, os.dup(file.fileno())
        weakref.finalize(self, os.close, self.descriptor)

    def fileno(self):
        return self.descriptor


class Stored:
    """A tensor in C order of this machine's byte order that fills a span of a file: shape, dtype, rows().

    np.asarray reads it whole. Raises UserError whenever it is read and the file is damaged.
    """

    def __init__(self, held, span, shape, dtype):
        self.held, self.span, self.shape, self.dtype = held, span, shape, dtype
        self.ndim, self.size, self.nbytes = len(shape), span.nbytes // dtype.itemsize, span.nbytes

    def __len__(self):
        return self.shape[0]

    def rows(self):
        """(first, array [k, ...]) of consecutive rows; an array is valid until the next one is asked for.

        The checksum is that of all rows, so what was made of them counts only once this has ended.
        """
        width, place, found = self.nbytes // len(self), self.span.start, 0
        count = min(len(self), max(1, PIECE // width))
        count -= count % 16 if count > 16 else 0  # transposed, they fill whole lines of the cache
        with explained(self.held.path):
            memory = np.empty(count * width, np.uint8)
            for first in range(0, len(self), count):
                piece = memory[: (min(first + count, len(self)) - first) * width]
                read_into(self.held, piece, place)
                place += len(piece)
                if self.span.crc:
                    found = zlib.crc32(piece, found)
                yield first, piece.view(self.dtype).reshape(-1, *self.shape[1:])
            if found != self.span.crc:
                raise UserError(DAMAGED.format(self.span.start, place))

    def __array__(self, dtype=None, copy=None):
        if copy is False:
            raise ValueError("the tensor lies in a file: without a copy there is no array of it.")
        with explained(self.held.path):
            array = self.span.read(self.held).view(self.dtype).reshape(self.shape)
            return array if dtype is None else array.astype(dtype, copy=False)


def lies_as_it_is(tensor, span):
    """Whether a tensors.Tensor has rows and is its whole span just as that lies there: a Stored can be it."""
    plain = span.swap is None and not tensor.conjugate and not tensor.negative and tensor.dtype.kind != "b"
    whole = tensor.offset == 0 and tensor.storage.start == 0 and tensor.nbytes == span.nbytes
    has_rows = len(tensor.shape) > 0 and tensor.nbytes > 0
    strides = [0] * len(tensor.shape)
    extent = 1
    for axis in reversed(range(len(tensor.shape))):
        strides[axis], extent = extent, extent * tensor.shape[axis]
    in_order = all(
        stride == expected or size == 1
        for stride, expected, size in zip(tensor.strides, strides, tensor.shape, strict=True)
    )
    return plain and whole and has_rows and in_order
