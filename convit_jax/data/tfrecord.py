"""TFRecord files read by record number, without TensorFlow.

A record is its length (uint64), a masked CRC-32C of the length (uint32), the payload, and a masked CRC-32C of
the payload (uint32), all little-endian. One pass from header to header finds every record. Of a payload, a
tf.train.Example, the pass reads only the few bytes around the image: a tenth of ImageNet's 150 GB.
"""

import functools
import itertools
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import google_crc32c
import numpy as np
from google.protobuf.message import DecodeError

from convit_jax.data.index import Arrays, Index
from convit_jax.errors import UserError

HEADER = struct.Struct("<QI")
CRC = struct.Struct("<I")
SMALL = 4096  # bytes; larger features of an Example are images
BUFFER = 8192  # bytes read at once in a pass: the end of one record and the start of the next

Description = tuple[int, bytes | None]  # label and file name of a record
Describe = Callable[[Any], Description]  # of the features of an Example, {name: tf.train.Feature}


class TfRecords:
    """The records of TFRecord files, found by an index with the arrays shard, offset and length."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths

    def read(self, index: Index, number: int) -> bytes:
        """Returns the payload of a record; raises UserError if it cannot be read or has another CRC."""
        shard, offset, length = (int(index.arrays[name][number]) for name in ("shard", "offset", "length"))
        try:
            data = os.pread(_opened(self.paths[shard]), length + CRC.size, offset)
            if len(data) < length + CRC.size or masked_crc(data[:length]) != CRC.unpack(data[length:])[0]:
                raise ValueError(f"wrong CRC of the record at byte {offset}")
        except (OSError, ValueError) as error:
            raise damaged_shard(self.paths[shard], error) from error
        return data[:length]

    def scan(
        self, shard_lengths: Sequence[int], describe: Describe, progress: Callable[[int], Any]
    ) -> tuple[list[Description], Arrays]:
        """Returns what `describe` returns for each record, and the arrays of the index.

        Raises UserError if a file is damaged or does not have the given number of records. `progress` is called
        with the number of records of each finished file, `describe` with the features of at most 4 KB.
        """

        def list_shard(path: str, expected: int) -> tuple[list[Description], np.ndarray]:
            try:
                records = list(_scan_file(path, describe))
                if len(records) != expected:
                    raise ValueError(f"{len(records)} records instead of the {expected} in dataset_info.json")
            except (OSError, ValueError, IndexError, DecodeError) as error:
                raise damaged_shard(path, error) from error
            progress(expected)
            places = np.array([place for place, _ in records], np.int64).reshape(-1, 2)
            return [description for _, description in records], places

        with ThreadPoolExecutor(16) as pool:  # several reads at once, for network and parallel disks
            described, places = zip(*pool.map(list_shard, self.paths, shard_lengths), strict=True)
        offset, length = np.concatenate(places).T
        shard = np.repeat(np.arange(len(self.paths), dtype=np.int32), shard_lengths)
        return list(itertools.chain(*described)), {"shard": shard, "offset": offset, "length": length}


def damaged_shard(path: str, reason: Exception) -> UserError:
    """Returns the error to raise for a shard that cannot be read."""
    first = str(reason).split(";")[0].split("\n")[0].strip()
    return UserError(f"the shard {path} is missing, truncated or damaged ({first}): copy it again.")


def masked_crc(data: bytes) -> int:
    """Returns TFRecord's checksum: the CRC-32C rotated by 15 bits, plus a constant."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@functools.cache
def _opened(path: str) -> int:
    """The descriptor of a file, which stays open: opening takes long on network disks."""
    return os.open(path, os.O_RDONLY)


def _scan_file(path: str, describe: Describe) -> Iterator[tuple[tuple[int, int], Description]]:
    """Yields ((offset, length), description) of each record."""
    from tensorflow_datasets.proto import tf_feature_pb2

    size = os.path.getsize(path)
    with open(path, "rb", buffering=BUFFER) as file:
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead of images
        position = 0
        while position < size:
            header = _read(file, position, HEADER.size).ljust(HEADER.size)  # if truncated, its CRC is wrong
            length, crc = HEADER.unpack(header)
            if masked_crc(header[:8]) != crc:
                raise ValueError(f"wrong CRC of a length at byte {position}")
            offset = position + HEADER.size
            position = offset + length + CRC.size
            if position > size:
                raise ValueError("it ends within a record")
            features = tf_feature_pb2.Features.FromString(_small_features(file, offset, length))
            yield (offset, length), describe(features.feature)


def _read(file: BinaryIO, position: int, length: int) -> bytes:
    """Reads bytes at a position; a move within the file's buffer costs no system call."""
    file.seek(position)
    return file.read(length)


def _small_features(file: BinaryIO, offset: int, length: int) -> bytes:
    """Returns a Features message with the small entries of the Example at an offset.

    Example {features = 1: Features {feature = 1: map entries}}: each level is a tag, a length and a body.
    """
    end = offset + length
    position, _ = _body(file, offset)
    kept = []
    while position < end:
        body, size = _body(file, position)
        if size <= SMALL:
            kept.append(_read(file, position, body + size - position))
        position = body + size
    return b"".join(kept)


def _body(file: BinaryIO, position: int) -> tuple[int, int]:
    """Returns the start and length of the length-delimited field 1 at a position."""
    head = _read(file, position, 11)  # a tag and a varint of at most ten bytes
    size = 0
    for used, byte in enumerate(head[1:] if head[:1] == b"\n" else b""):
        size |= (byte & 0x7F) << (7 * used)
        if byte < 0x80:
            return position + 2 + used, size
    raise ValueError("a record is no tf.train.Example")
