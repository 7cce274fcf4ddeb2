"""The zip archive that torch.save has written since PyTorch 1.6: a directory of stored members.

PyTorch never compresses, so a member is a stretch of the file and is read with one call into the
array that is handed on. Python's zipfile would copy it in pieces and believes the sizes in the
directory; here each is checked against the file, members may not overlap, compressed ones are
refused (so there is no bomb), and the checksum is verified, which PyTorch itself does not do.

    [header, name, data] ... [directory: an entry per member] [zip64 record] [end record]
"""

import itertools
import struct
from dataclasses import dataclass

from convit_jax.errors import UserError
from convit_jax.weights.tensors import read_bytes
from convit_jax.weights.unpickler import quoted

END = struct.Struct("<4s4H2LH")  # signature, disks, entries, directory's size and place, comment's length
ZIP64_LOCATOR = struct.Struct("<4sLQL")
ZIP64_END = struct.Struct("<4sQ2H2L4Q")
ENTRY = struct.Struct("<4s4B4HL2L5H2L")  # an entry of the directory
HEADER = struct.Struct("<4s5H3L2H")  # what stands before a member's data
MAX_MEMBERS, MAX_DIRECTORY = 100_000, 2**26  # ConViT-B has 186


@dataclass(frozen=True)
class Member:
    """Where a member's data lies; crc is 0 if it was written without a checksum."""

    start: int
    size: int
    crc: int


class Archive:
    """The members of a zip file, {name: Member}; `file` is open, `size` its length."""

    def __init__(self, file, size):
        self.file = file
        place, length, count = self._find_directory(size)
        self.members = self._read_directory(place, length, count)

    def read(self, name):
        """A member's bytes, uint8 [n]."""
        if name not in self.members:
            raise UserError(f"its zip archive has no member {quoted(name)}.")
        member = self.members[name]
        return read_bytes(self.file, member.start, member.size, member.crc)

    def _find_directory(self, size):
        """(place, length in bytes, entries) of the directory, from the record at the file's end."""
        tail = read_bytes(self.file, max(0, size - 2**16 - END.size), min(size, 2**16 + END.size)).tobytes()
        at = tail.rfind(b"PK\x05\x06")
        while at >= 0 and at + END.size + int.from_bytes(tail[at + 20 : at + 22], "little") != len(tail):
            at = tail.rfind(b"PK\x05\x06", 0, at)
        if at < 0:
            raise UserError("it is cut off (a zip archive without its end): fetch it again.")
        *_, count, length, place, _ = END.unpack_from(tail, at)
        end = size - len(tail) + at
        if tail[max(0, at - ZIP64_LOCATOR.size) : at].startswith(b"PK\x06\x07"):
            _, _, zip64, _ = ZIP64_LOCATOR.unpack_from(tail, at - ZIP64_LOCATOR.size)
            if zip64 > end - ZIP64_LOCATOR.size - ZIP64_END.size:
                raise UserError("its zip directory is damaged.")
            record = read_bytes(self.file, zip64, ZIP64_END.size).tobytes()
            signature, *_, count, length, place = ZIP64_END.unpack(record)
            end = zip64
            if signature != b"PK\x06\x06":
                raise UserError("its zip directory is damaged.")
        if place + length != end or count * ENTRY.size > length or length > MAX_DIRECTORY:
            raise UserError("its zip directory is damaged (wrong sizes).")
        if count > MAX_MEMBERS:
            raise UserError(f"its zip archive has {count:,} members; up to {MAX_MEMBERS:,} are read.")
        return place, length, count

    def _read_directory(self, place, length, count):
        directory = read_bytes(self.file, place, length).tobytes()
        members, spans, at = {}, [], 0
        for _ in range(count):
            if len(directory) - at < ENTRY.size:
                raise UserError("its zip directory is damaged (too short).")
            (signature, _, _, _, _, flags, method, _, _, crc, packed, size, name_length, extra_length,
             comment_length, _, _, _, header) = ENTRY.unpack_from(directory, at)  # fmt: skip
            at += ENTRY.size
            name = directory[at : at + name_length]
            extra = directory[at + name_length : at + name_length + extra_length]
            at += name_length + extra_length + comment_length
            if signature != b"PK\x01\x02" or at > len(directory):
                raise UserError("its zip directory is damaged.")
            size, packed, header = wide_sizes(extra, size, packed, header)
            if method or size != packed or flags & 1:
                raise UserError(
                    f"its member {quoted(name.decode(errors='replace'))} is compressed or encrypted, "
                    "as PyTorch never writes it: unpack it and zip it again with `zip -0`."
                )
            start = self._data_start(name, header, place)
            if start + size > place:
                raise UserError(
                    f"its member {quoted(name.decode(errors='replace'))} is longer than the file."
                )
            text = name.decode(errors="replace")
            if text in members:
                raise UserError(f"it has two members {quoted(text)}.")
            members[text] = Member(start, size, crc)
            spans.append((header, start + size))
        spans.sort()
        if any(end > header for (_, end), (header, _) in itertools.pairwise(spans)):
            raise UserError("its zip archive has members that overlap.")
        return members

    def _data_start(self, name, header, place):
        """Where a member's data begins: behind its own header, which must bear the same name."""
        if header + HEADER.size + len(name) > place:
            raise UserError("its zip directory is damaged (a member beyond the end).")
        front = read_bytes(self.file, header, HEADER.size + len(name)).tobytes()
        signature, *_, method, _, _, _, _, _, name_length, extra_length = HEADER.unpack_from(front)
        if signature != b"PK\x03\x04" or method or name_length != len(name) or front[HEADER.size :] != name:
            raise UserError(
                f"its member {quoted(name.decode(errors='replace'))} is not where the directory says."
            )
        return header + HEADER.size + name_length + extra_length


def wide_sizes(extra, size, packed, header):
    """(size, packed size, place of the header), from the zip64 field where they exceed 32 bits."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        field = extra[at + 4 : at + 4 + length]
        if kind == 1:
            wide = [value for (value,) in struct.iter_unpack("<Q", field[: length // 8 * 8])]
            size, packed, header = (
                wide.pop(0) if value == 2**32 - 1 and wide else value for value in (size, packed, header)
            )
        at += 4 + length
    return size, packed, header
