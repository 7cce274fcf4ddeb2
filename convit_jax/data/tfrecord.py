"""TFRecord files read by record number, without TensorFlow.

A record is its length (uint64), a masked CRC-32C of the length (uint32), the payload, and a masked CRC-32C of
the payload (uint32), all little-endian. One pass from header to header finds every record. Of a payload, a
tf.train.Example, the pass reads only the few bytes around the image: a tenth of ImageNet's 150 GB.
"""

import itertools
import os
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import google_crc32c
import numpy as np

from convit_jax.data.index import Index
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
        self.paths = list(paths)
        self._descriptors: dict[int, int] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple:
        return TfRecords, (self.paths,)

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def read(self, index: Index, number: int) -> bytes:
        """Returns the payload of a record.

        Raises:
          UserError: the file cannot be read, or the payload does not match its CRC.
        """
        shard, offset, length = (int(index.arrays[name][number]) for name in ("shard", "offset", "length"))
        path = self.paths[shard]
        try:
            with self._lock:
                if shard not in self._descriptors:
                    self._descriptors[shard] = os.open(path, os.O_RDONLY)
            data = os.pread(self._descriptors[shard], length + CRC.size, offset)
        except OSError as error:
            raise UserError(f"cannot read the shard {path} ({error.strerror}): check the disk.") from error
        if len(data) < length + CRC.size or masked_crc(data[:length]) != CRC.unpack(data[length:])[0]:
            raise UserError(f"the record at byte {offset} of {path} is damaged (wrong CRC): copy it again.")
        return data[:length]

    def scan(
        self, shard_lengths: Sequence[int], describe: Describe, progress: Callable[[int], Any]
    ) -> tuple[list[Description], dict[str, np.ndarray]]:
        """Lists all records.

        Args:
          shard_lengths: number of records that each file must have.
          describe: gets the features of at most 4 KB; raises IndexError if one is missing.
          progress: called with the number of records of each finished file.

        Returns:
          What `describe` returned for each record, and the arrays of the index.

        Raises:
          UserError: a file is missing, truncated or damaged, or has another number of records.
        """

        def list_shard(path: str, expected: int) -> tuple[list[Description], np.ndarray]:
            records = list(_scan_file(path, describe))
            if len(records) != expected:
                raise UserError(
                    f"the shard {path} holds {len(records)} records instead of the {expected} in "
                    "dataset_info.json: copy it again."
                )
            progress(expected)
            places = np.array([(offset, length) for offset, length, _ in records], np.int64).reshape(-1, 2)
            return [description for *_, description in records], places

        with ThreadPoolExecutor(16) as pool:  # several reads at once, for network and parallel disks
            described, places = zip(*pool.map(list_shard, self.paths, shard_lengths), strict=True)
        offset, length = np.concatenate(places).T
        shard = np.repeat(np.arange(len(self.paths), dtype=np.int32), shard_lengths)
        arrays = {"shard": shard, "offset": offset, "length": length}
        return list(itertools.chain.from_iterable(described)), arrays


def masked_crc(data: bytes) -> int:
    """Returns TFRecord's checksum: the CRC-32C rotated by 15 bits, plus a constant."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _scan_file(path: str, describe: Describe) -> Iterator[tuple[int, int, Description]]:
    """Yields (offset, length, description) of each record."""
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_feature_pb2

    size = os.path.getsize(path)
    with open(path, "rb", buffering=BUFFER) as file:
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead of images
        position = 0
        while position < size:
            header = _read(file, position, HEADER.size)
            if len(header) < HEADER.size:
                raise UserError(f"the shard {path} is truncated within a record: copy it again.")
            length, crc = HEADER.unpack(header)
            if masked_crc(header[:8]) != crc:
                raise UserError(
                    f"the shard {path} is damaged at byte {position} (wrong CRC of a length): copy it again."
                )
            offset = position + HEADER.size
            position = offset + length + CRC.size
            if position > size:
                raise UserError(f"the shard {path} is truncated within a record: copy it again.")
            try:
                features = tf_feature_pb2.Features.FromString(_small_features(file, offset, length))
                yield offset, length, describe(features.feature)
            except (DecodeError, IndexError) as error:
                raise UserError(
                    f"the record at byte {offset} of {path} is no labelled tf.train.Example: "
                    "prepare the data set again."
                ) from error


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
    if head[0] != 0x0A:
        raise IndexError
    size = 0
    for used, byte in enumerate(head[1:]):
        size |= (byte & 0x7F) << (7 * used)
        if byte < 0x80:
            return position + 2 + used, size
    raise IndexError
