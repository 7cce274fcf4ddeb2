"""Zip archives that are cut off or lie about what is in them are refused before memory is taken."""

import struct
import zipfile

import numpy as np
import pytest
from conftest import ROOT
from forgery import raw_zip, tensor, zip_end

from convit_jax.weights import reader

GOLDEN = ROOT / "tests/golden"
DATA = bytes(range(16))
MEMBERS = {"archive/data.pkl": tensor(0, (4,), (1,), False, {}), "archive/data/0": DATA}
WHOLE = raw_zip(MEMBERS)
END, DIRECTORY = len(WHOLE) - 22, WHOLE.index(b"PK\1\2")
MORE = {**MEMBERS, "archive/data/1": DATA}


def test_the_archive_that_the_others_are_made_of(tmp_path):
    (tmp_path / "fine.pth").write_bytes(WHOLE)
    np.testing.assert_array_equal(reader.read(tmp_path / "fine.pth"), np.frombuffer(DATA, np.float32))
    (tmp_path / "comment.pth").write_bytes(WHOLE[:-2] + b"\7\0PK\5\6...")
    np.testing.assert_array_equal(reader.read(tmp_path / "comment.pth"), np.frombuffer(DATA, np.float32))


def test_archives_without_checksums(tmp_path):
    """PyTorch can be told to write none; the field is 0 then."""
    at = WHOLE.rindex(b"PK\1\2") + 16
    (tmp_path / "unchecked.pth").write_bytes(WHOLE[:at] + bytes(4) + WHOLE[at + 4 :].replace(DATA, bytes(16)))
    np.testing.assert_array_equal(reader.read(tmp_path / "unchecked.pth"), np.frombuffer(DATA, np.float32))


def wide_end(at, count=2**60, length=2**60, place=2**61):
    """A zip64 record, its locator that says it lies `at` some byte, and the end record."""
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, length, place)
    return record + struct.pack("<4sLQL", b"PK\6\7", 0, at, 1) + WHOLE[END:]


FALSE = {
    "compressed": (raw_zip(MEMBERS, method=8), r"'archive/data\.pkl' is compressed"),
    "a bomb": (raw_zip({"archive/data/0": bytes(10**7)}, method=8), "'archive/data/0' is compressed"),
    "too long": (raw_zip(MEMBERS, sizes={"archive/data/0": 2**31}), "data/0' is longer than the file"),
    "too short": (raw_zip(MEMBERS, sizes={"archive/data/0": 12}), "has 12 bytes and needs 16"),
    "elsewhere": (raw_zip(MEMBERS, places={"archive/data/0": 0}), "not where the directory says"),
    "beyond": (raw_zip(MEMBERS, places={"archive/data/0": 2**31}), "a member beyond the end"),
    "in the directory": (raw_zip(MEMBERS, places={"archive/data/0": END - 9}), "a member beyond the end"),
    "other name": (WHOLE.replace(b"data/0", b"data/1", 1), "not where the directory says"),
    "two of a name": (raw_zip(MORE).replace(b"data/1", b"data/0"), "two members"),
    "no pickle": (raw_zip({"archive/x": DATA}), r"not one that torch.save has written \(no data\.pkl\)"),
    "two pickles": (raw_zip({**MEMBERS, "other/data.pkl": b"N."}), "not one that torch.save has written"),
    "a program": (raw_zip({**MEMBERS, "archive/constants.pkl": b""}), "TorchScript"),
    "byte order": (raw_zip({**MEMBERS, "archive/byteorder": b"middle"}), "byte order is 'middle'"),
    "damaged numbers": (WHOLE.replace(DATA, bytes(16)), "wrong checksum of bytes"),
    "damaged pickle": (WHOLE.replace(b"FloatStorage", b"floatStorage"), "wrong checksum of bytes"),
    "a size of 4 GB": (WHOLE[:END] + zip_end(2, 2**32 - 1, 0), r"damaged \(wrong sizes\)"),
    "a third member": (WHOLE[:END] + zip_end(3, END - DIRECTORY, DIRECTORY), "wrong sizes"),
    "2**60 members": (WHOLE[:END] + wide_end(END), r"damaged \(wrong sizes\)"),
    "record at 2**63": (WHOLE[:END] + wide_end(2**63), "directory is damaged"),
    "record elsewhere": (WHOLE[:END] + wide_end(0), "directory is damaged"),
    "no directory": (WHOLE[:END], "cut off"),
    "nothing inside": (b"PK\5\6" + bytes(18), "neither a PyTorch"),
}  # fmt: skip


@pytest.mark.parametrize("case", FALSE)
def test_archives_that_lie(refused, case):
    refused(*FALSE[case])


def test_members_that_overlap(refused):
    """The storage lies inside of another member, so that few bytes could be read many times."""
    members = {**MEMBERS, "archive/data/1": raw_zip({"archive/data/0": DATA})}
    inside = raw_zip(members).rindex(b"PK\3\4")
    refused(raw_zip(members, places={"archive/data/0": inside}), "members that overlap")


def test_too_many_members(refused):
    directory = bytes(46 * 200_000)
    end = wide_end(4 + len(directory), 200_000, len(directory), 4)
    refused(b"PK\3\4" + directory + end, "has 200,000 members; up to 100,000")


def test_a_zip_of_something_else(refused, tmp_path):
    with zipfile.ZipFile(tmp_path / "weights.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused((tmp_path / "weights.pth").read_bytes(), r"no data\.pkl")


@pytest.mark.parametrize("name", ["kinds_zip.pth", "kinds_stream.pth", "convit_golden.safetensors"])
def test_files_cut_off_anywhere(refused, name):
    data = (GOLDEN / name).read_bytes()
    places = [1, 2, 7, 8, 9, 30, *range(100, len(data), len(data) // 20), len(data) - 20, len(data) - 1]
    assert len(places) > 20
    for place in places:
        refused(data[:place], "cut off|declares|neither|describes", name)
