"""Checkpoints are read without PyTorch and without running anything; hostile and damaged ones are refused."""

import json
import os
import pickle
import re
import sys
import time

import ml_dtypes
import numpy as np
import pytest
from conftest import GOLDEN, run_python
from forgery import call, named, program, rebuilt, save_torch, storage, torch_zip, value
from numpy.testing import assert_array_equal  # np.testing would be imported while `read` looks for new modules

from convit_jax.errors import UserError
from convit_jax.weights import checkpoint_file
from convit_jax.weights.checkpoint_file import MAGIC, read_state_dict
from convit_jax.weights.torch_pickle import ELEMENTS

KINDS = ("kinds_zip.pth", "kinds_zip_protocol_5.pth", "kinds_stream.pth")
FOUR = np.arange(4, dtype=np.float32)


@pytest.fixture
def read(tmp_path, monkeypatch):
    """A function: the state dict in a file of these bytes. Nothing is imported or written meanwhile."""
    monkeypatch.chdir(tmp_path)
    modules = {*sys.modules}

    def read_bytes(data, **kwargs):
        (tmp_path / "weights.pth").write_bytes(data)
        return read_state_dict("weights.pth", **kwargs)

    yield read_bytes
    assert not [name for name in {*sys.modules} - modules if not name.startswith("encodings.")]
    assert os.listdir(tmp_path) == ["weights.pth"]


@pytest.fixture
def refused(read):
    """A function: a file of these bytes is refused soon with one message."""

    def check(data, match):
        start = time.process_time()
        with pytest.raises(UserError, match=match) as caught:
            read(data)
        assert time.process_time() - start < 5
        assert re.fullmatch(r"cannot read weights.pth.{,480}\.", str(caught.value))
        assert str(caught.value).isprintable()

    return check


def same(array, expected):
    """Equal in numbers, shape and element type."""
    assert array.dtype == expected.dtype
    assert_array_equal(array, expected, strict=True)


def state_dict(tensor, name="a"):
    """The instructions for {"model": {name: tensor}}."""
    return b"}" + value("model") + b"}" + value(name) + tensor + b"ss"


GOOD = rebuilt(0, (4,), (1,))  # a tensor of four numbers
WHOLE = torch_zip(program(state_dict(GOOD)), [FOUR.tobytes()])


def checkpoint(body):
    """A file of this pickle and one storage."""
    return torch_zip(program(body), [FOUR.tobytes()])


# ---- What PyTorch wrote (tests/golden/make_checkpoints.py) -----------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_every_element_type_in_every_format(name):
    tensors = {key.removeprefix("module."): array for key, array in read_state_dict(GOLDEN / name).items()}
    names = [name for name, *_ in ELEMENTS if name != "float8_e8m0fnu"]  # it has no zero to count from
    assert {*tensors} == {*names}
    for name in names:
        same(tensors[name], np.arange(6).reshape(2, 3).astype(name))
    assert tensors["bfloat16"].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("name", KINDS)
def test_views(name, monkeypatch):
    monkeypatch.setattr(checkpoint_file, "PLACES", ("views",))
    views, base = read_state_dict(GOLDEN / name), np.arange(24, dtype=np.float32).reshape(4, 6)
    same(views["whole"], base)
    same(views["transposed"], base.T)
    same(views["row"], base[2])
    same(views["steps"], base[1::2, ::3])
    same(views["expanded"], np.array([[0, 0, 0], [1, 1, 1]], np.float32))
    same(views["scalar"], np.array(7, np.float32))
    same(views["empty"], np.zeros((0, 3), np.float32))
    same(views["channels_last"], np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4))
    assert np.shares_memory(views["whole"], views["steps"])


# ---- Where the state dict is -----------------------------------------------------------------


@pytest.mark.parametrize("place", [None, *checkpoint_file.PLACES, *checkpoint_file.EMA_PLACES])
def test_places_of_the_state_dict(read, place):
    tensors = b"}" + value("a") + GOOD + b"s"
    data = checkpoint(tensors if place is None else b"}" + value(place) + tensors + b"s")
    ema = place in checkpoint_file.EMA_PLACES
    same(read(data, ema=ema)["a"], FOUR)
    with pytest.raises(UserError, match=f"no state dict .*; it holds '{place or 'a'}'"):
        read(data, ema=not ema)


NAME = checkpoint_file.NETWORK


@pytest.mark.parametrize(
    ("tree", "left_out"),
    [
        ({f"_orig_mod.module.{NAME}": FOUR, "_orig_mod.module.b": FOUR}, ""),
        ({"n_averaged": FOUR, f"module.{NAME}": FOUR, "module.b": FOUR}, "n_averaged"),
        ({"state_dict": {f"model.{NAME}": FOUR, "model.b": FOUR, "loss.w": FOUR}, "epoch": 3, "loops": {}}, "loss.w"),
        ({f"model.{NAME}": FOUR, "model.b": FOUR, "head.mlp.weight": FOUR}, "head.mlp.weight"),
        ({"module": {NAME: FOUR, "b": FOUR}, "buffer_names": [], "loss": FOUR}, ""),
        ({"net": {NAME: FOUR, "b": FOUR, "epoch": 5, "total_ops": FOUR}, "acc": 91.2}, "epoch, total_ops"),
    ],
    ids=["compiled", "averaged", "lightning", "dino", "deepspeed", "net"],
)
def test_the_network_is_found_in_what_trainers_wrap_around_it(tree, left_out, tmp_path, capsys):
    save_torch(tmp_path / "a.pth", tree)
    assert list(read_state_dict(tmp_path / "a.pth")) == [NAME, "b"]
    assert capsys.readouterr().err == (f"Left out of the state dict: {left_out}\n" if left_out else "")


def test_the_head_of_a_wrapper_counts_where_the_network_has_none(tmp_path):
    save_torch(tmp_path / "a.pth", {f"backbone.{NAME}": FOUR, "head.bias": FOUR})
    assert list(read_state_dict(tmp_path / "a.pth")) == [NAME, "head.bias"]
    save_torch(tmp_path / "a.pth", {f"backbone.{NAME}": FOUR, "backbone.head.bias": FOUR, "head.bias": 2 * FOUR})
    same(read_state_dict(tmp_path / "a.pth")["head.bias"], FOUR)


def test_which_of_two_networks_is_asked(tmp_path):
    for tree in (
        {"student": {NAME: FOUR}, "teacher": {NAME: FOUR}},
        {"model": {f"student.{NAME}": FOUR, f"teacher.{NAME}": FOUR}},
    ):
        save_torch(tmp_path / "a.pth", tree)
        with pytest.raises(UserError, match=r"several networks .*student.*teacher.*save the one you want alone"):
            read_state_dict(tmp_path / "a.pth")


def test_only_what_is_needed_is_read(refused, read):
    """A damaged storage of the optimizer does not matter, one of the model does."""
    other = value("optimizer") + rebuilt(0, (4,), (1,), of=storage(4, key=1))
    data = torch_zip(program(state_dict(GOOD) + other + b"s"), [FOUR.tobytes(), b"1" * 16])
    same(read(data.replace(b"1" * 16, b"2" * 16))["a"], FOUR)
    refused(data.replace(FOUR.tobytes(), b"2" * 16), "it is damaged .BadZipFile: Bad CRC-32 for file")


@pytest.mark.parametrize(
    "thing",
    [
        call("argparse.Namespace") + value({"lr": 0.1}) + b"b",
        call("torch.Size", (2, 3)),
        call("numpy._core.multiarray.scalar", "f8", b"12345678"),
        call("numpy.core.multiarray._reconstruct", 0, (0,), b"b") + value((1, (2,), "f4", b"1")) + b"b",
        named("omegaconf.DictConfig") + b")\x81" + value({"lr": 0.1}) + b"b",
        named("os.system") + value(("touch ran",)) + b"R",
        call("builtins.getattr", "os", "system") + value(("touch ran",)) + b"R",
        b"c__main__\nModel\n)\x81" + value({"a": 1}) + b"b(" + value("k") + value(1) + b"u(K\1e",
        value([True, None, -1, 70000, 2**40, 0.5, "grün", (1, (2,)), {3}, frozenset({4}), bytearray(b"x")]),
        value({140234234234: 1, 0.5: 2, b"k": 3, True: 4, None: 5}),
    ],
)  # fmt: skip
def test_things_next_to_the_weights_do_nothing(read, thing):
    body = b"}(" + value("model") + b"}" + value("a") + GOOD + b"s" + value("more") + thing + b"u"
    same(read(checkpoint(body))["a"], FOUR)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickled_attacks_do_nothing(refused, protocol):
    class Attack:
        def __reduce__(self):
            return os.system, ("touch ran",)

    data = torch_zip(pickle.dumps({"model": Attack()}, protocol))
    refused(data, r"no state dict .* it holds 'model' \(posix.system\)")


def test_entries_that_are_no_tensors_are_named(refused):
    subclass = (
        named("torch._tensor._rebuild_from_type_v2") + b"(" + named("torch._utils._rebuild_tensor_v2")
        + named("torchao.Quantized") + b"(" + storage(4) + value(0) + value((4,)) + value((1,)) + b"\x89}t}tR"
    )  # fmt: skip
    lazy = [rebuilt(0, (4,), (1,), more=(False, {}, {flag: True})) for flag in ("conj", "neg")]
    for thing, kind in (
        *((tensor, r"torch.Tensor with a lazy conj\(\) or neg\(\)") for tensor in lazy),
        (call("torch._utils._rebuild_sparse_tensor", 1), "torch._utils._rebuild_sparse_tensor"),
        (subclass, "torchao.Quantized"),
    ):
        body = b"}" + value("model") + b"}(" + value("a") + GOOD + value("b") + thing + b"us"
        refused(checkpoint(body), rf"entries that are no tensors \('b' \({kind}\)\)")
    refused(checkpoint(b"}" + b"K\1" + GOOD + b"s"), r"no state dict .* it holds '1' \(Tensor\)")


# ---- Pickles that attack ---------------------------------------------------------------------

DEEP = b")" + b"\x85" * 150_000
DOUBLED = b")q\0" + b"h\0h\0\x86q\0" * 40
CALLED_OFTEN = b"(" + b"N" * 60_000 + b"tq\1" + named("torch._utils._rebuild_parameter") + b"q\2" + b"h\2h\1R" * 20
PICKLES = {
    "a deep key": (b"}" + DEEP + b"Ns", "not a plain value"),
    "a deep member": (b"\x8f(" + DEEP + b"\x90", "it holds one builtins.set"),
    "a doubled key": (DOUBLED + b"}h\0Ns", "not a plain value"),
    "a deep key through OrderedDict": (named("collections.OrderedDict") + b"]]" + DEEP + b"aNaa\x85R", "damaged"),
    "a deep key through a parameter": (
        b"}" + named("torch._utils._rebuild_parameter") + DEEP + b"\x89N\x87RNs", "not a plain value"),
    "a deep element type": (
        rebuilt(0, (4,), (1,), name="torch._utils._rebuild_tensor_v3")[:-2] + DEEP + b"tR", "unknown type"),
    "a deep storage": (b"(" + value("storage") + named("torch.FloatStorage") + DEEP + b"NK\4tQ", "not a storage"),
    "long numbers as keys": (value({k * (2**61 - 1): 0 for k in range(1, 9)}), "not a plain value"),
    "a long tuple for many calls": (CALLED_OFTEN, "damaged"),
    "calls in calls": (
        named("torch._tensor._rebuild_from_type_v2") + b"q\0" + b"(h\0N" * 30_000 + b")" + b"Nt" * 30_000 + b"R",
        "RecursionError"),
    "instructions": (b"N" * 250_000, "more than 200,000 instructions"),
    "a memo index of 2**31": (b"Nr\0\0\0\x80", "it holds one NoneType"),
    "a function that changes": (
        named("torch._utils._rebuild_tensor_v2") + b"N}" + value("__defaults__") + value((1,)) + b"s\x86b", "BUILD as"),
    "a text of 4 GB": (b"X\xff\xff\xff\xffabc", "damaged"),
    "a bytearray of 2**40": (b"\x96\0\0\0\0\0\1\0\0", "damaged"),
    "an instance": (b"(ios\nsystem\n", "INST as PyTorch never does"),
    "a deep name": (DEEP + b"K\2\x93", "STACK_GLOBAL as"),
    "unprintable": (named("a.\x1b[31m"), r"it holds one a.\\x1b\[31m"),
}  # fmt: skip
TENSORS = {
    "too long": (rebuilt(0, (5,), (1,)), r"shape \(5,\) reaches beyond its storage"),
    "negative stride": (rebuilt(3, (4,), (-1,)), "wrong properties"),
    "text in a size": (rebuilt(0, ("a", 2**33), (1, 1)), "wrong properties"),  # math.prod would make 8 GB
    "65 dimensions": (rebuilt(0, (1,) * 65, (1,) * 65), "wrong properties"),
    "empty and endless": (rebuilt(0, (0, 2**55, 2**55), (0,) * 3), "damaged"),
    "one number a billion times": (rebuilt(0, (2**30,), (0,)), "far more than the file's size"),
    "arguments missing": (call("torch._utils._rebuild_tensor_v2", 0), "damaged"),
    "storage of terabytes": (rebuilt(0, (4,), (1,), of=storage(2**40)), "has not 4,398,046,511,104 bytes"),
    "storage of -1": (rebuilt(0, (4,), (1,), of=storage(-1)), "unknown type"),
    "storage elsewhere": (rebuilt(0, (4,), (1,), of=storage(4, "../x")), r"storage ../x has not 16 bytes"),
    "storage of no type": (rebuilt(0, (4,), (1,), of=storage(4, kind="torch.QInt8Storage")), "unknown type"),
    "not a storage": (rebuilt(0, (4,), (1,), of=b"(" + value("module") + b"NNNNtQ"), "is not a storage"),
    "of no type": (call("torch._tensor._rebuild_from_type_v2", 1, 2, (), {}), "REDUCE as"),
}  # fmt: skip


def test_memory_stays_near_the_size_of_the_file(tmp_path):
    """A file of 64 MB is read within its size and one copy, without PyTorch."""
    save_torch(tmp_path / "large.pth", {"a": np.zeros((2**12, 2**12), np.float32)})
    code = (
        "import resource, sys; from convit_jax.weights.checkpoint_file import read_state_dict\n"
        "def used(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = used(); read_state_dict(sys.argv[1]); print(used() - before, 'torch' in sys.modules)"
    )
    kilobytes, has_torch = run_python("-c", code, tmp_path / "large.pth").stdout.split()
    assert int(kilobytes) < 2 * 2**16 + 2**12
    assert has_torch == "False"


# ---- Files that lie --------------------------------------------------------------------------


def test_the_file_that_the_others_are_made_of(read):
    same(read(WHOLE)["a"], FOUR)
    at = WHOLE.index(b"archive/data/0", WHOLE.index(b"PK\1\2")) - 30  # the checksum in the directory
    unchecked = WHOLE[:at] + bytes(4) + WHOLE[at + 4 :]
    same(read(unchecked)["a"], FOUR)  # PyTorch can be told to write no checksums


def safetensors_file(header, data):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(begin=0, end=8, shape=(2,)):
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}


HEADERS = [  # what our reader makes of places and shapes; the library finds the rest, see test_fuzz.py
    safetensors_file({"a": entry(), "b": entry(4, 12)}, bytes(12)),  # overlap
    safetensors_file({"a": entry(), "b": entry(12, 20)}, bytes(20)),  # a gap
    safetensors_file({"a": entry(0, 4, (1,) * 65)}, bytes(4)),
    safetensors_file({"a": entry(0, 0, (0, 2**61, 2**61))}, b""),
]
FILES = {
    "compressed": (torch_zip(program(state_dict(GOOD)), [bytes(10**7)], method=8), "perhaps compressed"),
    "no pickle": (torch_zip(b"").replace(b"data.pkl", b"data.txt"), "a zip archive that torch.save did not"),
    "a program": (torch_zip(program(call("__torch__.Net")), **{"constants.pkl": b""}), "it is a TorchScript archive"),
    "byte order": (torch_zip(b"", byteorder=b"big"), "big-endian"),
    "no storage": (torch_zip(program(state_dict(GOOD))), "storage 0 has not 16 bytes"),
    "damaged numbers": (WHOLE.replace(FOUR.tobytes(), bytes(16)), "Bad CRC-32 for file 'archive/data/0'"),
    "damaged pickle": (WHOLE.replace(b"FloatStorage", b"floatStorage"), "Bad CRC-32 for file"),
    "too long": (WHOLE.replace(b"\x10\0\0\0\x10\0\0\0", b"\xff\xff\xff\x7f" * 2), "larger than the file"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "LFS pointer.* lfs pull"),
    "html": (b"\n<!DOCTYPE html><html><title>404</title></html>", "perhaps a web page"),
    "text pickle": (b"cos\nsystem\n(S'touch ran'\ntR.", "neither a PyTorch checkpoint"),
}
FILES |= {f"header {number}": (data, "damaged") for number, data in enumerate(HEADERS)}
FILES |= {f"pickle: {name}": (checkpoint(body), match) for name, (body, match) in PICKLES.items()}
FILES |= {f"tensor: {name}": (checkpoint(state_dict(body)), match) for name, (body, match) in TENSORS.items()}


@pytest.mark.parametrize("case", FILES)
def test_files_that_lie_attack_or_make_no_sense(refused, case):
    refused(*FILES[case])


def test_streams_that_lie(refused, read):
    head = b"".join(pickle.dumps(part, 2) for part in (MAGIC, 1001, {}))
    good = program(state_dict(GOOD))
    keys, numbers = pickle.dumps(["0"], 2), (4).to_bytes(8, "little") + FOUR.tobytes()
    same(read(head + good + keys + numbers)["a"], FOUR)
    refused(pickle.dumps("weights", 2), "a pickle that torch.save did not write")
    for false in (["1"], [], [["0"]], {"0": 1}, 7):
        refused(head + good + pickle.dumps(false, 2) + numbers, "list of storages does not fit")
    refused(head + good + keys + numbers[:-1], "cut off in storage 0")
    refused(head + good + keys + (2**62).to_bytes(8, "little") + bytes(16), "cut off in storage 0")
    endless = program(state_dict(rebuilt(0, (4,), (1,), of=storage(2**40))))
    refused(head + endless + keys + numbers, "cut off in storage 0")
    attack = pickle.dumps([0], 2)[:-1] + call("os.system", "touch ran") + b"."
    for count in range(3):
        refused(b"".join(pickle.dumps(part, 2) for part in (MAGIC, 1001, {})[:count]) + attack, "damaged|did not")


@pytest.mark.parametrize("name", ["kinds_zip.pth", "kinds_stream.pth", "convit_golden.safetensors"])
def test_files_cut_off_anywhere(refused, name):
    data = (GOLDEN / name).read_bytes()
    for place in (1, 2, 7, 8, 9, 30, *range(100, len(data), len(data) // 12), len(data) - 20, len(data) - 1):
        refused(data[:place], "cut off|damaged|neither")
