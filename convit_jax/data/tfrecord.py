"""TFRecord files read by position, without TensorFlow. Damage raises OSError or ValueError.

A record is its length (uint64), a masked CRC-32C of the length (uint32), the payload, and a masked CRC-32C of
the payload (uint32), all little-endian.
"""

import functools
import os
import struct
from collections.abc import Iterator

import google_crc32c

HEADER = struct.Struct("<QI")
CRC = struct.Struct("<I")


def read_record(path: str, start: int) -> bytes:
    """Returns the payload of the record that starts at a byte of a file."""
    payload, crc = _read(_opened(path), start)
    if masked_crc(payload) != crc:
        raise ValueError(f"wrong CRC of the record at byte {start}")
    return payload


def scan(path: str) -> Iterator[tuple[int, bytes]]:
    """Yields (start, payload) of each record; does not check the payload, which may be one bad image of many."""
    with open(path, "rb") as file:
        start, end = 0, os.fstat(file.fileno()).st_size
        while start < end:
            payload, _ = _read(file.fileno(), start)
            yield start, payload
            start += HEADER.size + len(payload) + CRC.size


def masked_crc(data: bytes) -> int:
    """Returns TFRecord's checksum: the CRC-32C rotated by 15 bits, plus a constant."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@functools.cache
def _opened(path: str) -> int:
    """The descriptor of a file, which stays open: opening takes long on network disks."""
    return os.open(path, os.O_RDONLY)


def _read(descriptor: int, start: int) -> tuple[bytes, int]:
    """The payload of a record and its CRC."""
    header = os.pread(descriptor, HEADER.size, start).ljust(HEADER.size)  # if truncated, its CRC is wrong
    length, crc = HEADER.unpack(header)
    if masked_crc(header[:8]) != crc:
        raise ValueError(f"wrong CRC of the length at byte {start}")
    data = os.pread(descriptor, length + CRC.size, start + HEADER.size)
    if len(data) < length + CRC.size:
        raise ValueError("it ends within a record")
    return data[:length], CRC.unpack(data[length:])[0]
