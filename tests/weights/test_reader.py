"""Checkpoints that PyTorch wrote (tests/golden/make_checkpoints.py) are read in full, without PyTorch."""

import pickle
import struct
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from conftest import ROOT
from forgery import storage, tensor, value

from convit_jax.errors import UserError
from convit_jax.weights import dtypes, reader, torch_file, writer

GOLDEN = ROOT / "tests/golden"
KINDS = ("kinds_zip.pth", "kinds_zip_protocol_5.pth", "kinds_stream.pth")


def same(array, expected):
    """Equal in numbers, shape and element type."""
    assert isinstance(array, (np.ndarray, np.generic))
    assert array.dtype == expected.dtype
    np.testing.assert_array_equal(array, expected, strict=True)


@pytest.fixture(scope="module", params=KINDS)
def kinds(request):
    return reader.read(GOLDEN / request.param)


def test_every_element_type(kinds):
    names = [name for name in dtypes.TORCH if name != "float8_e8m0fnu"]  # it has no zero to count from
    assert {*kinds["model"]} == {f"module.{name}" for name in names}
    for name in names:
        expected = np.arange(6).reshape(2, 3).astype(dtypes.TORCH[name])
        same(kinds["model"][f"module.{name}"], expected)
    assert kinds["model"]["module.bfloat16"].dtype == ml_dtypes.bfloat16


def test_views(kinds):
    views, base = kinds["views"], np.arange(24, dtype=np.float32).reshape(4, 6)
    same(views["whole"], base)
    same(views["transposed"], base.T)
    same(views["row"], base[2])
    same(views["steps"], base[1::2, ::3])
    same(views["expanded"], np.array([[0, 0, 0], [1, 1, 1]], np.float32))
    same(views["scalar"], np.array(7, np.float32))
    same(views["empty"], np.zeros((0, 3), np.float32))
    same(views["channels_last"], np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4))
    assert views["channels_last"].strides == (96, 4, 32, 8)


def test_shared_storages_share_memory(kinds):
    first, second, tail = kinds["tied"]
    same(first, np.arange(3, dtype=np.float32))
    same(tail, np.array([1, 2], np.float32))
    assert np.shares_memory(first, second)
    assert np.shares_memory(first, tail)
    assert np.shares_memory(kinds["views"]["whole"], kinds["views"]["steps"])


def test_tensors_with_more_to_them(kinds):
    same(kinds["parameter"], np.arange(2, dtype=np.float32))
    same(kinds["carrier"], np.arange(2, dtype=np.float32))
    same(kinds["conjugate"], np.array([1 - 2j], np.complex64))
    same(kinds["rng"], np.arange(16, dtype=np.uint8))
    same(kinds["optimizer"]["state"][0]["step"], np.array(3, np.float32))
    same(kinds["optimizer"]["state"][0]["exp_avg"], np.arange(5, dtype=np.float32))


def test_what_is_not_a_tensor(kinds):
    assert kinds["size"] == (2, 3)
    assert kinds["device"] == "cuda:1"
    assert kinds["dtype"] == ml_dtypes.bfloat16
    assert kinds["args"] == {"lr": 5e-4, "output": "/runs/one", "resume": "", "world": None}
    same(kinds["best"], np.float64(71.5))
    same(kinds["numpy"], np.arange(6, dtype=np.int32).reshape(2, 3))
    same(kinds["fortran"], np.arange(6.0).reshape(2, 3))
    same(kinds["nothing"], np.zeros((0, 2), np.float32))
    assert kinds["counter"] == {30: 1, 60: 2}
    assert kinds["default"] == {"a": [1]}
    expected = [True, None, -1, 300, 70000, 2**40, -(2**70), 0.5, "grün", b"\x00\xff", (1, (2,)), {3}, 1j]
    assert kinds["plain"] == expected
    assert {type(kinds[name]) for name in ("args", "counter", "default", "model")} == {dict}


def test_big_endian(read_state_dict):
    tensors = read_state_dict(GOLDEN / "big_endian.pth")
    same(tensors["a"], np.arange(6, dtype=np.float32).reshape(2, 3))
    same(tensors["b"], np.array([1, 2, 3], np.float32))


@pytest.mark.parametrize("name", ["convit_golden.pth", "convit_golden_training.pth"])
def test_golden_files_are_equal(read_state_dict, name):
    tensors = read_state_dict(GOLDEN / name)
    expected = read_state_dict(GOLDEN / "convit_golden.safetensors")
    assert {*tensors} == {*expected}
    assert list(tensors)[:3] == ["cls_token", "pos_embed", "patch_embed.proj.weight"]  # PyTorch's order
    for parameter, array in tensors.items():
        same(array, expected[parameter])


def test_a_training_checkpoint_in_full():
    tree = reader.read(GOLDEN / "convit_golden_training.pth")
    assert list(tree) == ["model", "optimizer", "lr_scheduler", "epoch", "model_ema", "args"]
    assert tree["epoch"] == 7
    assert tree["args"] == {"model": "convit_small", "lr": 5e-4, "embed_dim": 8, "local_up_to_layer": 3}
    assert tree["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("name", KINDS)
def test_state_dict_is_found_and_its_prefix_taken_off(read_state_dict, name):
    tensors = read_state_dict(GOLDEN / name)
    assert list(tensors)[:2] == ["float32", "float64"]
    assert "transposed" in read_state_dict(GOLDEN / name, places=["views"])


def test_the_average_where_the_authors_and_timm_keep_it():
    plain, average = {"a": np.zeros(1)}, {"a": np.ones(1)}
    for names in (("model", "model_ema"), ("state_dict", "state_dict_ema")):
        tree = dict(zip(names, (plain, average), strict=True))
        assert reader.find_state_dict(tree) is plain
        assert reader.find_state_dict(tree, reader.EMA_PLACES) is average


def test_no_state_dict(read_state_dict):
    with pytest.raises(
        UserError, match=r"no state dict.* under 'nets': it holds 'model' \(dictionary\), .*more"
    ):
        read_state_dict(GOLDEN / "kinds_zip.pth", places=["nets"])


def test_only_what_is_asked_for_is_read(read_state_dict, tmp_path):
    """A damaged storage outside of the state dict does not hinder reading that."""
    data = bytearray((GOLDEN / "kinds_zip.pth").read_bytes())
    at = data.index(
        np.arange(5, dtype=np.float32).tobytes(), data.index(np.arange(16, dtype=np.uint8).tobytes())
    )
    data[at] ^= 1
    (tmp_path / "damaged.pth").write_bytes(data)
    assert len(read_state_dict(tmp_path / "damaged.pth")) == 19
    with pytest.raises(UserError, match="wrong checksum of bytes"):
        reader.read(tmp_path / "damaged.pth")


def test_prefixes_of_several_wrappers(read_state_dict, tmp_path):
    tensors = {"_orig_mod.module.a": np.ones(2), "_orig_mod.module.b": np.ones(3)}
    writer.write(tmp_path / "wrapped.pth", tensors)
    assert list(read_state_dict(tmp_path / "wrapped.pth")) == ["a", "b"]
    writer.write(tmp_path / "mixed.pth", {"module.a": np.ones(2), "b": np.ones(3)})
    assert list(read_state_dict(tmp_path / "mixed.pth")) == ["module.a", "b"]


def test_no_module_of_pytorch_is_imported():
    code = (
        "import sys; from convit_jax.weights import reader; before = {*sys.modules}; "
        "reader.read('tests/golden/kinds_zip.pth'); "
        "print(sorted({*sys.modules} - before), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[] False\n"


def test_streams_that_lie(refused):
    head = b"".join(pickle.dumps(part, 2) for part in (torch_file.MAGIC, 1001, {}))
    body = tensor(0, (4,), (1,), False, {}, of=storage(4, more=b"N"))
    keys, numbers = pickle.dumps(["0"], 2), struct.pack("<q", 4) + bytes(16)
    refused(pickle.dumps("weights", 2), "a pickle, but not one that torch.save has written")
    refused(pickle.dumps(torch_file.MAGIC, 2) + pickle.dumps(2000, 2), "unknown version")
    for false in (["1"], ["0", "0"], [], [["0"]], {"0": 1}, 7):
        refused(head + body + pickle.dumps(false, 2) + numbers, "list of storages does not fit")
    refused(head + body + keys + numbers[:-1], "cut off in storage '0'")
    for false in (2**62, -4, 5, 0):
        refused(
            head + body + keys + struct.pack("<q", false) + bytes(16), f"has {false:,} elements, its tensors"
        )
    refused(head + tensor(of=storage(2**40, more=b"N")) + keys + numbers, "wrong arguments")
    endless = tensor(0, (4,), (1,), False, {}, of=storage(2**40, more=b"N"))
    refused(head + endless + keys + numbers, "cut off in storage '0'")
    beyond = tensor(0, (1,), (1,), False, {}, of=storage(4, more=value(("v", 3, 4))))
    refused(head + beyond + keys + numbers, "view reaches beyond it")


def test_views_of_storages_in_the_oldest_streams(tmp_path):
    head = b"".join(pickle.dumps(part, 2) for part in (torch_file.MAGIC, 1001, {}))
    body = tensor(1, (2,), (1,), False, {}, of=storage(6, more=value(("v", 2, 4))))
    numbers = struct.pack("<q", 6) + np.arange(6, dtype="<f4").tobytes()
    (tmp_path / "old.pt").write_bytes(head + body + pickle.dumps(["0"], 2) + numbers)
    same(reader.read(tmp_path / "old.pt"), np.array([3, 4], np.float32))


OTHERS = {
    "nothing": (b"", "it is empty: fetch it again"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "LFS pointer.* lfs pull"),
    "html": (b"\n<!DOCTYPE html><html><title>404</title></html>", "it is a web page"),
    "json": (b'{"error": "Repository not found"}', "it is JSON text"),
    "json list": (b'["Repository not found"]', "it is JSON text"),
    "tar": (bytes(257) + b"ustar" + bytes(250), "tar format of PyTorch before 2017"),
    "noise": (bytes(range(256)), "neither a PyTorch checkpoint"),
    "gzip": (b"\x1f\x8b\x08" + bytes(30), "neither a PyTorch checkpoint"),
    "text pickle": (b"cos\nsystem\n(S'touch ran'\ntR.", "neither a PyTorch checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_files_of_another_kind(refused, case):
    for name in ("weights.pth", "weights.safetensors"):
        refused(*OTHERS[case], name)


def test_no_file(tmp_path):
    with pytest.raises(
        UserError, match=r"cannot read .*none\.pth \(No such file or directory\): check the path\."
    ):
        reader.read(tmp_path / "none.pth")
    with pytest.raises(UserError, match=r"\(Is a directory\): check the path\."):
        reader.read(tmp_path)
