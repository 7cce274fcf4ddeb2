"""What is written is what PyTorch and safetensors write: proven by structure, and read back."""

import errno
import json
import os
import pickletools
import zipfile

import ml_dtypes
import numpy as np
import pytest
from conftest import ROOT

from convit_jax.errors import UserError
from convit_jax.weights import dtypes, reader, writer

GOLDEN = ROOT / "tests/golden"


def assert_same_tensors(tensors, expected):
    """Equal names in order, numbers, shapes and element types."""
    assert list(tensors) == list(expected)
    for name, array in tensors.items():
        assert array.dtype == expected[name].dtype
        assert array.shape == expected[name].shape
        assert array.flags.c_contiguous
        assert array.tobytes() == expected[name].tobytes()  # not-a-numbers too


def every_type():
    tensors = {name: np.arange(6).reshape(2, 3).astype(dtype) for name, dtype in dtypes.TORCH.items()}
    strided = np.arange(24, dtype=np.float32).reshape(4, 6)[::2, ::-3].T
    more = {
        "scalar": np.float32(7),
        "empty": np.zeros((0, 3)),
        "strided": strided,
        "big": np.arange(3, dtype=">i4"),
    }
    return {**tensors, **more, "grün.weight": np.ones(1)}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_golden_there_and_back(read_state_dict, tmp_path, suffix):
    tensors = read_state_dict(GOLDEN / "convit_golden.pth")
    writer.write(tmp_path / f"back{suffix}", tensors)
    assert_same_tensors(read_state_dict(tmp_path / f"back{suffix}"), tensors)
    assert os.listdir(tmp_path) == [f"back{suffix}"]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_every_element_type(tmp_path, suffix):
    tensors = every_type()
    if suffix == ".safetensors":
        lacks = ("complex128", "float8_e4m3fnuz", "float8_e5m2fnuz")
        tensors = {name: array for name, array in tensors.items() if name not in lacks}
    writer.write(tmp_path / f"all{suffix}", tensors)
    back = reader.read(tmp_path / f"all{suffix}")
    assert_same_tensors(back, {**tensors, "big": np.arange(3, dtype=np.int32)})


def test_zip_is_built_as_torch_save_builds_it(read_state_dict, tmp_path):
    """The names and calls of the pickle are those in PyTorch's own file, in the same order."""
    writer.write(tmp_path / "ours.pth", read_state_dict(GOLDEN / "convit_golden.pth"))
    told = []
    for path, root in ((GOLDEN / "convit_golden.pth", "convit_golden"), (tmp_path / "ours.pth", "archive")):
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
            assert archive.read(f"{root}/byteorder") == b"little"
            assert archive.read(f"{root}/version").strip() == b"3"
            program = archive.read(f"{root}/data.pkl")
            storages = {
                info.filename.partition("/")[2]: info.CRC
                for info in archive.infolist()
                if "/data/" in info.filename
            }
            assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        calls, texts = [], []
        for instruction, argument, _ in pickletools.genops(program):
            if instruction.name in ("REDUCE", "BINPERSID", "BUILD"):
                calls.append(instruction.name)
            if instruction.name == "BINUNICODE" and argument not in ("storage", "cpu"):
                texts.append(argument)
        told.append((storages, calls, texts))
    (theirs, their_calls, their_texts), (ours, our_calls, our_texts) = told
    assert ours == theirs
    assert our_calls == their_calls[: len(our_calls)]  # PyTorch adds the state dict's _metadata at the end
    names = list(read_state_dict(GOLDEN / "convit_golden.pth"))
    assert [text for text in our_texts if not text.isdigit()] == names
    assert [text for text in their_texts if text in names] == names


def test_zip_uses_only_what_weights_only_allows(tmp_path):
    writer.write(tmp_path / "ours.pth", every_type())
    with zipfile.ZipFile(tmp_path / "ours.pth") as archive:
        program = archive.read("archive/data.pkl")
        for info in archive.infolist():  # so that the file can be mapped
            header = archive.fp.seek(info.header_offset + 26) and archive.fp.read(4)
            lengths = int.from_bytes(header[:2], "little") + int.from_bytes(header[2:], "little")
            assert (info.header_offset + 30 + lengths) % 64 == 0
    instructions = list(pickletools.genops(program))
    assert {instruction.name for instruction, _, _ in instructions} == {
        *("PROTO", "GLOBAL", "EMPTY_TUPLE", "REDUCE", "MARK", "BINUNICODE", "BININT", "TUPLE", "BINPERSID"),
        *("NEWFALSE", "SETITEMS", "STOP"),
    }
    names = {
        argument.split(" ")[1] for instruction, argument, _ in instructions if instruction.name == "GLOBAL"
    }
    rebuild = {"OrderedDict", "_rebuild_tensor_v2", "_rebuild_tensor_v3", "UntypedStorage"}
    without_storage = {name for name, storage, _, _ in dtypes.TABLE if not storage}
    assert names == rebuild | without_storage | {*dtypes.STORAGE}


def test_safetensors_layout(tmp_path):
    """Wider types lie first, so that each tensor is aligned; the header keeps the order of names."""
    tensors = {
        "flag": np.ones(3, bool),
        "half": np.ones(3, ml_dtypes.bfloat16),
        "wide": np.ones(1),
        "w": np.ones(2, "f4"),
    }
    writer.write(tmp_path / "a.safetensors", tensors)
    data = (tmp_path / "a.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    assert header == {
        "__metadata__": {"format": "pt"},
        "flag": {"dtype": "BOOL", "shape": [3], "data_offsets": [22, 25]},
        "half": {"dtype": "BF16", "shape": [3], "data_offsets": [16, 22]},
        "wide": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]},
        "w": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
    }
    assert len(data) == 8 + length + 25
    assert list(reader.read(tmp_path / "a.safetensors")) == list(tensors)


@pytest.mark.parametrize(
    ("name", "tensors", "match"),
    [
        ("a.npz", {}, "does not end in .pth, .pt or .safetensors"),
        ("a.pth", {"names": np.array(["a"])}, "PyTorch has no element type for 'names'"),
        ("a.pth", {"objects": np.array([None])}, "PyTorch has no element type for 'objects'"),
        ("a.safetensors", {"z": np.zeros(1, complex)}, "safetensors has no element type for 'z'"),
        ("none/a.pth", {"a": np.zeros(1)}, "cannot write .*No such file or directory"),
        ("folder.pth", {"a": np.zeros(1)}, "cannot write .*Is a directory"),
    ],
)
def test_what_cannot_be_written(tmp_path, name, tensors, match):
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(UserError, match=match):
        writer.write(tmp_path / name, tensors)
    assert os.listdir(tmp_path) == ["folder.pth"]


def test_a_file_stays_whole_when_writing_fails(tmp_path):
    writer.write(tmp_path / "a.safetensors", {"a": np.ones(3)})
    before = (tmp_path / "a.safetensors").read_bytes()
    with pytest.raises(UserError):
        writer.write(tmp_path / "a.safetensors", {"a": np.zeros(3), "z": np.zeros(1, complex)})
    assert (tmp_path / "a.safetensors").read_bytes() == before
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_file_that_is_given_up_leaves_nothing(tmp_path):
    def half(reason):
        with writer.whole_file(tmp_path / "a") as file:
            file.write(b"half")
            raise reason

    with pytest.raises(UserError, match=r"cannot write .*/a \(No space left on device\)"):
        half(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(KeyboardInterrupt):
        half(KeyboardInterrupt())
    assert os.listdir(tmp_path) == []
