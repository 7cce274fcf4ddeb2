"""TFRecord files read by position, without TensorFlow.

A record is its length (uint64), a masked CRC-32C of the length (uint32), the payload, and a masked CRC-32C of
the payload (uint32), all little-endian.
"""

import os
import struct
from collections.abc import Iterator

import google_crc32c

HEADER = struct.Struct("<QI")
CRC = struct.Struct("<I")


class TfRecordFile:
    """The records of a file, found by the byte at which they start. Raises OSError or ValueError for damage."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)  # stays open: opening takes long on network disks

    def __getitem__(self, start: int) -> bytes:
        payload, crc = self._read(start)
        if masked_crc(payload) != crc:
            raise ValueError(f"wrong CRC of the record at byte {start}")
        return payload

    def items(self) -> Iterator[tuple[int, bytes]]:
        """Yields (start, payload) of each record; does not check the payload, which may be one bad image of many."""
        start, end = 0, os.fstat(self.descriptor).st_size
        while start < end:
            payload, _ = self._read(start)
            yield start, payload
            start += HEADER.size + len(payload) + CRC.size

    def _read(self, start: int) -> tuple[bytes, int]:
        header = os.pread(self.descriptor, HEADER.size, start).ljust(HEADER.size)  # if truncated, its CRC is wrong
        length, crc = HEADER.unpack(header)
        if masked_crc(header[:8]) != crc:
            raise ValueError(f"wrong CRC of the length at byte {start}")
        data = os.pread(self.descriptor, length + CRC.size, start + HEADER.size)
        if len(data) < length + CRC.size:
            raise ValueError("it ends within a record")
        return data[:length], CRC.unpack(data[length:])[0]


def masked_crc(data: bytes) -> int:
    """Returns TFRecord's checksum: the CRC-32C rotated by 15 bits, plus a constant."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
