"""Pickles that attack: refused by name before anything is run, and bounded in memory and time."""

import os
import pickle

import numpy as np
import pytest
from forgery import call, named, program, storage, tensor, torch_zip, value

from convit_jax.weights import reader, torch_file

CALLS = """
os.system posix.system nt.system subprocess.Popen builtins.eval builtins.exec builtins.getattr
builtins.__import__ builtins.open builtins.globals builtins.range operator.attrgetter runpy.run_path
copyreg._reconstructor copyreg.__newobj__ functools.partial types.FunctionType marshal.loads pickle.loads
torch.load torch.hub.load torch.jit.load torch.storage._load_from_bytes torch._utils._rebuild_qtensor
torch._utils._rebuild_sparse_tensor torch._utils._rebuild_tensor_v2.__globals__ torch.nn.modules.linear.Linear
collections.OrderedDict.__reduce__ numpy.load numpy.testing.rundocs pathlib.Path.write_text webbrowser.open
importlib.import_module ctypes.CDLL timm.models.convit.ConVit
"""


class Attack:
    """Pickles into a call, as attackers do it."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("name", CALLS.split())
def test_calls_are_refused_by_name(refused, name):
    match = "it asks for " + name.replace(".", r"\.") + ", .*nothing of it was run"
    refused(torch_zip(call(name, "touch ran")), match)
    refused(call(name, "touch ran"), match)
    module, _, attribute = name.rpartition(".")
    refused(torch_zip(program(value(module), value(attribute), pickle.STACK_GLOBAL)), match)


def test_names_of_python_2(refused):
    refused(torch_zip(call("__builtin__.eval", "1")), r"it asks for builtins\.eval,")
    refused(torch_zip(call("copy_reg._reconstructor", "1")), r"it asks for copy_reg\._reconstructor,")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickled_attacks(refused, protocol):
    system = Attack(os.system, "touch ran")
    refused(torch_zip(pickle.dumps({"model": system}, protocol)), r"it asks for posix\.system")
    refused(torch_zip(pickle.dumps(np.array([system]), protocol)), "a NumPy array of type 'O8'; only numbers")
    hidden = Attack(getattr, Attack(__import__, "os"), "system")
    refused(torch_zip(pickle.dumps([hidden], protocol)), r"it asks for builtins\.getattr")


def test_attacks_in_every_part_of_the_older_stream(refused):
    attack = pickle.dumps(Attack(os.system, "touch ran"), 2)
    stream = b""
    for part in (torch_file.MAGIC, 1001, {}, {}, []):
        refused(stream + attack, r"it asks for posix\.system")
        stream += pickle.dumps(part, 2)


TENSORS = {
    "too long": (tensor(0, (5,), (1,), False, {}), r"shape \(5,\) reaches 20 bytes into its storage of 16"),
    "offset": (tensor(1, (4,), (1,), False, {}), "reaches 20 bytes"),
    "strides": (tensor(0, (4,), (2,), False, {}), "reaches 28 bytes"),
    "negative size": (tensor(0, (-1,), (1,), False, {}), "none negative"),
    "negative stride": (tensor(3, (4,), (-1,), False, {}), "none negative"),
    "a truth for a size": (tensor(0, (True,), (1,), False, {}), "must be whole numbers"),
    "a size of 2**70": (tensor(0, (2**70,), (0,), False, {}), "must be whole numbers"),
    "a text for a shape": (tensor(0, "a", (1,), False, {}), "_rebuild_tensor_v2 with wrong arguments"),
    "a stride of 2**61": (tensor(0, (1,), (2**61,), False, {}), "must be whole numbers"),
    "a stride missing": (tensor(0, (2, 2), (1,), False, {}), "2 dimensions and 1 strides"),
    "65 dimensions": (tensor(0, (1,) * 65, (1,) * 65, False, {}), "65 dimensions"),
    "empty and endless": (tensor(0, (0, 2**31, 2**31), (0,) * 3, False, {}), "which no memory holds"),
    "one number a billion times": (tensor(0, (2**30,), (0,), False, {}), "far more than the file's size"),
    "arguments missing": (tensor(0), "_rebuild_tensor_v2 with wrong arguments"),
    "neg of a real": (tensor(0, (4,), (1,), False, {}, {"neg": True}), "_v2 with wrong arguments"),
    "no storage": (tensor(0, (4,), (1,), False, {}, of=b"N"), "_v2 with wrong arguments"),
    "storage too short": (tensor(of=storage(5)), "storage '0' has 16 bytes and needs 20"),
    "storage of terabytes": (tensor(of=storage(2**40)), "has 16 bytes and needs 4,398,046,511,104"),
    "storage of -1": (tensor(of=storage(-1)), "a storage with wrong properties"),
    "storage of another path": (tensor(of=storage(4, "../data.pkl")), r"storage '../data\.pkl' is missing"),
    "storage of no type": (tensor(of=storage(4, dtype="torch.Tensor")), "a storage with wrong properties"),
    "storage of an unknown type": (
        tensor(of=storage(4, dtype="torch.QInt8Storage")),
        r"torch\.QInt8Storage,",
    ),
    "not a storage": (tensor(of=b"(" + value("module") + b"NNNNtQ"), "refers to 'module' outside of it"),
    "no identity": (tensor(of=b"K\1Q"), r"damaged \(BINPERSID with wrong"),
    "a sparse layout": (call("torch.serialization._get_layout", "torch.sparse_coo"), "only dense ones"),
    "a dtype for text": (call("numpy.dtype", "U9999"), "type 'U9999'; only numbers"),
    "an array without contents": (call("numpy.core.multiarray._reconstruct"), "array without contents"),
    "an array too long": (call("numpy.core.multiarray.scalar", "f8", b"1"), "scalar with wrong arguments"),
    "a tensor of tensors": (
        call("torch._tensor._rebuild_from_type_v2", 1, 2, (), {}),
        "with wrong arguments",
    ),
    "booleans of 2": (tensor(0, (4,), (1,), False, {}, of=storage(16, dtype="torch.BoolStorage")), "0 and 1"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_cannot_be(refused, case):
    data, match = TENSORS[case]
    refused(torch_zip(data, b"\2" * 16), match)


def test_the_tensor_that_can_be(tmp_path):
    """The cases above are refused for what is wrong with them, not for how they are made."""
    numbers = np.arange(4, dtype=np.float32)
    (tmp_path / "fine.pth").write_bytes(torch_zip(tensor(0, (4,), (1,), False, {}), numbers.tobytes()))
    np.testing.assert_array_equal(reader.read(tmp_path / "fine.pth"), numbers)


DEEP = 100_000
LADDER = b"".join(b"]h%caq%c" % (rung - 1, rung) for rung in range(1, 120))  # each list holds the one before
LIMITS = {
    "lists": (b"]" * DEEP + b"a" * (DEEP - 1), "nest deeper than 100 levels"),
    "tuples": (b")" + b"\x85" * DEEP, "nest deeper than 100 levels"),
    "itself": (b"]q\0h\0a", "nest deeper than 100 levels"),
    "a ladder met from below": (b"(]q\0" + LADDER + b"t", "nest deeper than 100 levels"),
    "lists of lists": (b"]q\0" + b"](h\0h\0eq\0" * 60, "repeat each other to more than 10,000,000 values"),
    "instructions": (b"N" * 2_100_000, "more than 2,000,000 instructions"),
    "copies": (
        named("builtins.set") + b"q\1(" + b"K\1" * 5000 + b"tq\2" + b"h\1h\2\x85R" * 400,
        "more than 2,000,000 instructions or elements",
    ),
    "texts": (
        named("_codecs.encode") + b"q\1" + value("a" * 2**20) + b"q\2" + value("latin1") + b"q\3"
        + b"h\1h\2h\3\x86R" * 9,
        "asks for the same text again and again",
    ),
    "zeros": (named("builtins.bytearray") + value((2**31 - 1,)) + b"R", "bytearray with wrong arguments"),
    "a deep key": (b"}" + b")" + b"\x85" * DEEP + b"Ns", "uses a tuple as a dictionary key"),
    "a deep member": (b"\x8f()" + b"\x85" * DEEP + b"\x90", "uses a tuple as a dictionary key or a set's"),
    "numbers that collide": (value({k * (2**61 - 1): 0 for k in range(1, 9)}), "uses a int as"),
    "not a number": (b"}G\x7f\xf8\0\0\0\0\0\0Ns", "uses a float as"),
    "a text of 4 GB": (b"X\xff\xff\xff\xffabc", "declares more bytes than the file has"),
    "bytes of 2**64": (b"\x8e" + b"\xff" * 8, "declares more bytes than the file has"),
    "a frame of 2**64": (b"\x95" + b"\xff" * 8, "declares more bytes than the file has"),
    "a number of 2 GB": (b"\x8b\xff\xff\xff\x7f", "instruction LONG4, which PyTorch never writes"),
    "a text of -1": (b"T\xff\xff\xff\xff", "a text of negative length"),
    "a number in digits": (b"I" + b"9" * DEEP + b"\n", "instruction INT, which"),
    "an instance": (b"(ios\nsystem\n", "instruction INST, which"),
    "an object": (b"(cos\nsystem\no", r"it asks for os\.system"),
    "an extension": (b"\x82\1", "instruction EXT1, which"),
    "a name without end": (b"c" + b"a" * 1000, "a name has no end"),
    "no instruction": (b"\xee", "no instruction 0xee"),
    "a protocol to come": (b"\x80\x06", "protocol 6; 5 is the newest"),
    "state of a number": (b"K\1}b", r"damaged \(BUILD with wrong"),
    "state of a name": (named("torch.Tensor") + value({"__setstate__": 1}) + b"b", r"\(BUILD with wrong"),
    "call of a text": (value("system") + b")R", r"damaged \(REDUCE with wrong"),
    "call of a type": (named("torch.float32") + b")R", r"damaged \(REDUCE with wrong"),
    "call without a tuple": (named("torch.Size") + b"]R", r"damaged \(REDUCE with wrong"),
    "a size of text": (named("torch.Size") + value(("abc",)) + b"R", r"torch\.Size with wrong"),
    "a memo of nothing": (b"h\7", r"damaged \(BINGET with wrong"),
    "append to text": (value("a") + b"Na", r"damaged \(APPEND with wrong"),
    "half a pair": (b"}(K\1u", r"damaged \(SETITEMS with wrong"),
    "not UTF-8": (b"X\1\0\0\0\xff", r"damaged \(BINUNICODE with wrong"),
    "nothing": (b"", r"damaged \(STOP with wrong"),
}  # fmt: skip


@pytest.mark.parametrize("case", LIMITS)
def test_pickles_that_ask_for_too_much_or_make_no_sense(refused, case):
    body, match = LIMITS[case]
    refused(torch_zip(program(body)), match)


def test_a_huge_memo_index_costs_nothing(tmp_path):
    (tmp_path / "memo.pth").write_bytes(torch_zip(program(b"Nr\xff\xff\xff\xff")))
    assert reader.read(tmp_path / "memo.pth") is None
