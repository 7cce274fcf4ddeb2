"""What a pickled tensor is before its numbers are read: a view of a storage that lies in the file.

A tensor is (storage, offset, shape, strides), counted in elements. Nothing is read while the
pickle is interpreted, so a part of a checkpoint that nobody asks for, such as the optimizer's
state, costs nothing; and every size is checked against the storage before memory is taken.
"""

import math
import mmap
import os
import zlib
from dataclasses import dataclass

import numpy as np

from convit_jax.errors import UserError

PIECE = 2**18  # bytes
DAMAGED = "it is damaged (wrong checksum of bytes {:,} to {:,}): fetch it again."


@dataclass(frozen=True, slots=True)
class Span:
    """Where a storage lies in the file.

    crc: its CRC-32, 0 if there is none. swap: element type of numbers that lie in the other byte order.
    """

    start: int
    nbytes: int
    crc: int = 0
    swap: np.dtype | None = None

    def read(self, file):
        """Its bytes from the open file, uint8 [nbytes], in this machine's byte order."""
        data = read_bytes(file, self.start, self.nbytes, self.crc)
        return data if self.swap is None else to_native(data, self.swap)


@dataclass(eq=False, slots=True)
class Storage:
    """Bytes in the file: `nbytes` from byte `start` of the record `key`, of element type `dtype`."""

    key: str
    dtype: np.dtype
    nbytes: int
    start: int = 0


@dataclass(eq=False, slots=True)
class Tensor:
    """A view of a storage; offset and strides count elements of `dtype`."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple
    strides: tuple
    conjugate: bool = False
    negative: bool = False

    def __post_init__(self):
        numbers = (self.offset, *self.shape, *self.strides)
        if not all(type(number) is int and 0 <= number < 2**56 for number in numbers):
            raise UserError("a tensor's offset, shape and strides must be whole numbers, none negative.")
        if len(self.shape) != len(self.strides) or len(self.shape) > 64:
            raise UserError(f"a tensor has {len(self.shape)} dimensions and {len(self.strides)} strides.")
        extent = math.prod(size or 1 for size in self.shape)  # an empty one may still be too large for NumPy
        if extent >= 2**56:
            raise UserError(f"a tensor has the shape {str(self.shape)[:80]}, which no memory holds.")
        span = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        last = self.offset + span + 1 if math.prod(self.shape) else 0
        if last * self.dtype.itemsize > self.storage.nbytes:
            raise UserError(
                f"a tensor of shape {str(self.shape)[:80]} reaches {last * self.dtype.itemsize:,} bytes into "
                f"its storage of {self.storage.nbytes:,}."
            )

    @property
    def nbytes(self):
        return math.prod(self.shape) * self.dtype.itemsize

    def array(self, data):
        """The tensor as an array; data is its storage's bytes, uint8 [n]. A view wherever one can be."""
        if not self.nbytes:
            return np.empty(self.shape, self.dtype)
        size = self.dtype.itemsize
        strides = tuple(stride * size for stride in self.strides)
        start = self.storage.start + self.offset * size
        array = np.ndarray(self.shape, self.dtype, buffer=data, offset=start, strides=strides)
        if self.dtype.kind == "b" and array.view(np.uint8).max() > 1:
            raise UserError("a tensor of booleans holds bytes other than 0 and 1.")
        if self.conjugate:
            array = array.conj()
        return -array if self.negative else array


def fresh(nbytes, *, at_once=True):
    """Memory that nobody has used, uint8 [nbytes].

    From 4 MB on NumPy asks the system for huge pages, whose making costs more than the reading: 0.7
    instead of 0.3 s of processor time for the 346 MB of ConViT-B (2 cores, fresh processes). Memory
    that is mapped for the purpose has small ones, made all at once, or where several threads fill it
    (not `at_once`) each when it is first written, by the thread that writes.
    """
    if nbytes < 2**22:
        return np.empty(nbytes, np.uint8)
    kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    if at_once:
        kind |= getattr(mmap, "MAP_POPULATE", 0)  # of Linux
    return np.frombuffer(mmap.mmap(-1, nbytes, kind), np.uint8)


def read_bytes(file, offset, nbytes, crc=0):
    """`nbytes` from a place in an open file, as uint8 [nbytes]; the caller knows that the file has them.

    A CRC-32 other than 0 is verified, piece by piece while the piece is still in the processor's cache.
    Safe in several threads.
    """
    data = fresh(nbytes)
    found = 0
    for done in range(0, nbytes, PIECE):
        piece = data[done : done + PIECE]
        read_into(file, piece, offset + done)
        if crc:
            found = zlib.crc32(piece, found)
    if found != crc:
        raise UserError(DAMAGED.format(offset, offset + nbytes))
    return data


def read_into(file, memory, offset):
    """Fill uint8 [n] from a place in an open file."""
    view, done = memoryview(memory), 0
    while done < len(view):
        count = os.preadv(file.fileno(), [view[done:]], offset + done)
        if not count:
            raise UserError(f"it ends {len(view) - done:,} bytes too early: fetch it again.")
        done += count


def to_native(data, dtype):
    """Turn big-endian numbers of a storage, uint8 [n], into this machine's order, in place."""
    width = dtype.itemsize // 2 if dtype.kind == "c" else dtype.itemsize
    data.view(f"u{width}").byteswap(inplace=True)
    return data
