"""TFRecord shards read in place, by index, without TensorFlow.

A record is its length (uint64), a masked CRC-32C of the length (uint32), the payload, and a masked
CRC-32C of the payload (uint32), all little-endian. One pass that hops from header to header finds
where every record lies; of a payload, a tf.train.Example, it reads the few bytes around the image
that hold label and file name, so that a pass over ImageNet's 150 GB reads about 10 GB of them.
"""

import itertools
import os
import struct
import threading
from concurrent.futures import ThreadPoolExecutor

import google_crc32c
import numpy as np

from convit_jax.errors import UserError

HEADER = struct.Struct("<QI")
CRC = struct.Struct("<I")
SMALL = 4096  # bytes; larger features of an Example are images and are skipped
WINDOW = 8192  # bytes read at once in a pass: the end of one record and the beginning of the next


class TfRecords:
    """The records of some shards, found by an index with the arrays shard, offset and length."""

    def __init__(self, paths):
        self.paths = list(paths)
        self._descriptors, self._lock = {}, threading.Lock()

    def __reduce__(self):
        return TfRecords, (self.paths,)

    def __del__(self):
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def read(self, index, number):
        """The payload of a record, its CRC checked; UserError if it is not what was written."""
        shard, offset, length = (int(index[name][number]) for name in ("shard", "offset", "length"))
        path = self.paths[shard]
        try:
            with self._lock:
                if shard not in self._descriptors:
                    self._descriptors[shard] = os.open(path, os.O_RDONLY)
            data = os.pread(self._descriptors[shard], length + CRC.size, offset)
        except OSError as error:
            raise UserError(f"cannot read the shard {path} ({error.strerror}): see to the disk.") from error
        if len(data) < length + CRC.size or masked_crc(data[:length]) != CRC.unpack(data[length:])[0]:
            raise UserError(
                f"the record at byte {offset} of {path} is damaged (its CRC does not fit): copy it anew."
            )
        return data[:length]

    def scan(self, shard_lengths, describe, progress):
        """Pass over all records.

        Args:
          shard_lengths: records that each shard must hold.
          describe: function of {name: tf.train.Feature}, the features of at most 4 KB; IndexError if it
            misses one.
          progress: is told how many records were passed, shard by shard.

        Returns:
          (iterator over what describe made of each record, the arrays of the index), shard by shard.

        Raises:
          UserError: a shard that is missing, cut off or damaged.
        """

        def pass_over(path, expected):
            described, places = [], []
            for offset, length, what in scan(path, describe):
                described.append(what)
                places.append((offset, length))
            if len(places) != expected:
                raise UserError(
                    f"the shard {path} holds {len(places)} records, dataset_info.json counts {expected}: "
                    "copy it anew."
                )
            progress(expected)
            return described, np.array(places, np.int64).reshape(-1, 2)

        with ThreadPoolExecutor(16) as pool:  # to wait for many disks or servers at once
            described, places = zip(*pool.map(pass_over, self.paths, shard_lengths), strict=True)
        offset, length = np.concatenate(places).T
        shard = np.repeat(np.arange(len(self.paths), dtype=np.int32), shard_lengths)
        return itertools.chain.from_iterable(described), dict(shard=shard, offset=offset, length=length)


def masked_crc(data):
    """TFRecord's checksum of some bytes: CRC-32C rotated by 15 bits, plus a constant."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def scan(path, describe):
    """Yield (offset, length, describe(small features)) of each record of a shard, in order.

    Raises:
      UserError: the shard is cut off or damaged, or its records are no Examples.
    """
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_feature_pb2

    size = os.path.getsize(path)
    with open(path, "rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # what lies between is not wanted
        read = _windows(file.fileno())
        position = 0
        while position < size:
            header = read(position, HEADER.size)
            whole = len(header) == HEADER.size
            length, crc = HEADER.unpack(header) if whole else (0, 0)
            if whole and masked_crc(header[:8]) != crc:
                raise UserError(
                    f"the shard {path} is damaged at byte {position} (the CRC of a length does not fit): "
                    "copy it anew."
                )
            offset = position + HEADER.size
            position = offset + length + CRC.size
            if not whole or position > size:
                raise UserError(f"the shard {path} is cut off: it ends within a record. Copy it anew.")
            try:
                features = tf_feature_pb2.Features.FromString(_small_features(read, offset, length))
                yield offset, length, describe(features.feature)
            except (DecodeError, IndexError) as error:
                raise UserError(
                    f"the record at byte {offset} of {path} is no labelled tf.train.Example: prepare it anew."
                ) from error


def _windows(descriptor):
    """A function (position, length) -> bytes of a file, which keeps the last WINDOW that it read."""
    data, begin = b"", 0

    def read(position, length):
        nonlocal data, begin
        if position < begin or position + length > begin + len(data):
            data, begin = os.pread(descriptor, max(length, WINDOW), position), position
        return data[position - begin : position - begin + length]

    return read


def _small_features(read, offset, length):
    """The bytes of a Features message with the small entries of the Example at offset.

    Example {features = 1: Features {feature = 1: map entries}}: each level is a tag, a length, a body.
    """
    end = offset + length
    position, _ = _body(read, offset)
    kept = []
    while position < end:
        body, size = _body(read, position)
        if size <= SMALL:
            kept.append(read(position, body + size - position))
        position = body + size
    return b"".join(kept)


def _body(read, position):
    """(where it begins, its length) of the body of a length-delimited field 1 at position."""
    head = read(position, 11)  # a tag and a varint of at most ten bytes
    if head[0] != 0x0A:
        raise IndexError
    value, shift, used = 0, 0, 1
    while True:
        byte = head[used]
        used += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return position + used, value
