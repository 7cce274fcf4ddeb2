"""Reads state dicts from PyTorch's .pth files and from .safetensors files, without PyTorch.

A .pth file holds a pickle, a program for a small stack machine. Nothing that it names is imported or called:
`check_pickle` reads the program first and refuses what would crash or exhaust the unpickler; then the
standard library's unpickler runs it with inert objects in place of every class and function. Tensors become
`Tensor` objects, and only the numbers of those in the state dict are read.
"""

import contextlib
import dataclasses
import io
import math
import os
import pickle
import pickletools
import re
import sys
import zipfile
from collections.abc import Callable, Iterator
from typing import IO, Any

import ml_dtypes  # noqa: F401  (registers bfloat16 and float8 with NumPy)
import numpy as np
import safetensors

from convit_jax.errors import UserError, explained

PLACES = ("model", "state_dict", "model_state_dict")  # where checkpoints keep the model's state dict
EMA_PLACES = ("model_ema", "state_dict_ema")  # of the authors' and of timm's training
PREFIXES = ("module.", "_orig_mod.")  # of torch's DataParallel and of torch.compile

# fmt: off
ELEMENTS = (  # PyTorch's name, which is NumPy's too; PyTorch's storage class; safetensors' code
    ("float32", "FloatStorage", "F32"), ("float64", "DoubleStorage", "F64"),
    ("float16", "HalfStorage", "F16"), ("bfloat16", "BFloat16Storage", "BF16"),
    ("int8", "CharStorage", "I8"), ("int16", "ShortStorage", "I16"), ("int32", "IntStorage", "I32"),
    ("int64", "LongStorage", "I64"), ("uint8", "ByteStorage", "U8"), ("bool", "BoolStorage", "BOOL"),
    ("uint16", "", "U16"), ("uint32", "", "U32"), ("uint64", "", "U64"),
    ("complex64", "ComplexFloatStorage", "C64"), ("complex128", "ComplexDoubleStorage", ""),
    ("float8_e4m3fn", "", "F8_E4M3"), ("float8_e4m3fnuz", "", "F8_E4M3FNUZ"), ("float8_e5m2", "", "F8_E5M2"),
    ("float8_e5m2fnuz", "", "F8_E5M2FNUZ"), ("float8_e8m0fnu", "", "F8_E8M0"),
)
# fmt: on
DTYPES = {name: np.dtype(name) for name, _, _ in ELEMENTS}
SAFETENSORS = {code: np.dtype(name) for name, _, code in ELEMENTS if code}

MAGIC = 0x1950A86A20F9469CFC6C  # begins a file in PyTorch's stream format
MAX_INSTRUCTIONS = 200_000  # a training checkpoint of ConViT-B with optimizer and EMA has about 30,000
MAX_UNKNOWN = 1_000  # classes and functions

StorageReader = Callable[["Storage"], bytes | memoryview]


def read_state_dict(path: str | os.PathLike[str], *, ema: bool = False) -> dict[str, np.ndarray]:
    """Returns the model's tensors in a .pth, .pt, .bin or .safetensors file.

    The state dict is the whole file or lies under one of `PLACES`; everything else in the file is ignored.
    `module.` before every name, as DataParallel writes it, is removed.

    Args:
      path: of the file. Its first bytes tell its kind, not its name.
      ema: read the moving average of the weights, which lies under one of `EMA_PLACES`.

    Returns:
      {name: array} with the file's shapes and dtypes (ml_dtypes' bfloat16 and float8), perhaps read-only.

    Raises:
      UserError: the file cannot be read, is damaged or malicious, or has no state dict there.
    """
    with explained(path), open(path, "rb") as file, _damage_explained():
        size = os.fstat(file.fileno()).st_size
        tree, read_storage = _open(file, size)
        tensors = _find_state_dict(tree, ema)
        if sum(tensor.nbytes for tensor in tensors.values()) > 4 * size + 2**24:
            raise UserError("its tensors repeat a few numbers to far more than the file's size.")
        storages: dict[str, np.ndarray] = {}
        for name, tensor in tensors.items():
            if isinstance(tensor, Tensor):
                key = tensor.storage.key
                if key not in storages:
                    storages[key] = np.frombuffer(read_storage(tensor.storage), np.uint8)
                tensors[name] = tensor.array(storages[key])
    while any(all(name.startswith(prefix) for name in tensors) for prefix in PREFIXES):
        tensors = {name.partition(".")[2]: array for name, array in tensors.items()}
    return tensors


@contextlib.contextmanager
def _damage_explained() -> Iterator[None]:
    """Turns every error that the libraries raise on damaged files into a UserError."""
    try:
        yield
    except (UserError, OSError, MemoryError):
        raise
    except Exception as error:  # zipfile, pickle and safetensors do not document what they raise
        reason = f"{type(error).__name__}: {_shown(str(error))}"
        raise UserError(f"it is damaged ({reason}): download or save it again.") from error


def _shown(text: str) -> str:
    """Text from the file as it may be printed: short and ASCII only."""
    return ascii(text if len(text) <= 100 else f"{text[:97]}...")[1:-1]


def _open(file: IO[bytes], size: int) -> tuple[Any, StorageReader]:
    """The object in a file and a function that reads its storages."""
    head = file.read(512)
    file.seek(0)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if head.startswith(b"PK\x03\x04"):
        return _open_zip(file, size)
    if head[8:9] == b"{" and b"\0" in head[:8]:  # eight bytes of a length; a text would have no zero bytes
        return _read_safetensors(file), lambda storage: b""
    if head.startswith(b"\x80"):
        return _open_stream(file)
    if not head:
        raise UserError("it is empty: download or save it again.")
    if head.startswith(b"version https://git-lfs"):
        raise UserError("it is a Git LFS pointer, not the file itself: run `git lfs pull`.")
    if text.startswith((b"<", b"{", b"[")):
        raise UserError("it is a web page or JSON text, perhaps an error message: download it again.")
    if head[257:262] == b"ustar" or re.match(rb"(sys_info|pickle|storages|tensors)\0", head):
        raise UserError("it has the tar format of PyTorch before 2017: save it with a newer PyTorch.")
    raise UserError(
        "it is neither a PyTorch checkpoint (.pth, .pt) nor a safetensors file: give one of these."
    )


# ---- The state dict in a checkpoint ---------------------------------------------------------


def _find_state_dict(tree: Any, ema: bool) -> dict[str, Any]:
    """{name: Tensor or array} of the model in a file's object."""
    places = EMA_PLACES if ema else PLACES
    inside = [tree.get(place) for place in places] if isinstance(tree, dict) else []
    for found in inside if ema else [*inside, tree]:
        if isinstance(found, dict) and any(_is_tensor(value) for value in found.values()):
            others = {
                name: value for name, value in found.items() if type(name) is not str or not _is_tensor(value)
            }
            if others:
                raise UserError(
                    f"its state dict has entries that are no tensors ({_described(others)}): "
                    "load it with PyTorch and save the tensors alone."
                )
            return dict(found)
    where = " or ".join(map(repr, places))
    raise UserError(
        f"it has no state dict {'' if ema else 'as a whole or '}under {where}; it holds {_described(tree)}: "
        "save the model's state_dict()."
    )


def _is_tensor(value: Any) -> bool:
    return isinstance(value, (Tensor, np.ndarray))


def _described(tree: Any) -> str:
    """What an object holds: "'epoch' (int), 'model' (timm.models.convit.ConVit)"."""
    if isinstance(tree, dict):
        entries = [f"'{_shown(str(name))}' ({_kind(value)})" for name, value in list(tree.items())[:8]]
        more = f" and {len(tree) - 8} more" if len(tree) > 8 else ""
        return ", ".join(entries) + more or "nothing"
    return f"one {_kind(tree)}"


def _kind(value: Any) -> str:
    if isinstance(value, Opaque):
        return _shown(value.name)
    return "dictionary" if isinstance(value, dict) else type(value).__name__


# ---- Formats --------------------------------------------------------------------------------


def _read_safetensors(file: IO[bytes]) -> dict[str, np.ndarray]:
    tensors = safetensors.deserialize(file.read())  # load_file does not read float8
    unknown = {tensor["dtype"] for _, tensor in tensors} - SAFETENSORS.keys()
    if unknown:
        raise UserError(f"it has tensors of type {', '.join(sorted(unknown))}: save them as another type.")
    return {
        name: np.ndarray(tensor["shape"], SAFETENSORS[tensor["dtype"]], tensor["data"])
        for name, tensor in sorted(tensors, key=lambda entry: entry[0])  # they come in random order
    }


def _open_zip(file: IO[bytes], size: int) -> tuple[Any, StorageReader]:
    """PyTorch 1.6 and later: members ROOT/data.pkl, ROOT/byteorder and ROOT/data/KEY per storage."""
    archive = zipfile.ZipFile(file)
    members = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in members if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise UserError("it is a zip archive that torch.save did not write: give the checkpoint inside.")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in members:
        raise UserError("it is a TorchScript program: load it with PyTorch and save its state_dict().")
    if any(info.compress_type for info in members.values()):
        raise UserError("it is compressed, as PyTorch never does: unpack it and zip it again with `zip -0`.")
    if sum(info.file_size for info in members.values()) > size:
        raise UserError("it is damaged (its members are larger than the file): download it again.")
    for info in members.values():
        if not info.CRC:
            del info.CRC  # PyTorch can be told to write no checksums; then zipfile checks none
    order = archive.read(f"{root}byteorder").decode() if f"{root}byteorder" in members else "little"
    if order not in ("little", "big"):
        raise UserError(f"it is damaged (byte order {_shown(order)}): download or save it again.")

    def read_storage(storage: Storage) -> bytes:
        name = f"{root}data/{storage.key}"
        if name not in members or members[name].file_size != storage.nbytes:
            raise UserError(
                f"it is damaged (storage {_shown(storage.key)} has not {storage.nbytes:,} bytes): "
                "download or save it again."
            )
        data = archive.read(name)  # checks the CRC-32
        return data if order == sys.byteorder else _swapped(data, storage.dtype)

    return _unpickle(io.BytesIO(archive.read(pickles[0])))[0], read_storage


def _open_stream(file: IO[bytes]) -> tuple[Any, StorageReader]:
    """PyTorch before 1.6: five pickles (magic number, version, system, object, keys), then the storages."""
    data = file.read()
    stream = io.BytesIO(data)

    if _unpickle(stream)[0] != MAGIC or _unpickle(stream)[0] != 1001:
        raise UserError("it is a pickle that torch.save did not write: save a state_dict() with torch.save.")
    _unpickle(stream)
    tree, storages = _unpickle(stream)
    keys, _ = _unpickle(stream)
    if type(keys) is not list or not all(type(key) is str for key in keys) or {*keys} != {*storages}:
        raise UserError("it is damaged (its list of storages does not fit its tensors): download it again.")
    places, place = {}, stream.tell()
    for key in keys:
        storage = storages[key]
        count = int.from_bytes(data[place : place + 8], "little")  # as the numbers, on any machine
        places[key] = place + 8
        place += 8 + storage.nbytes
        if count * storage.dtype.itemsize != storage.nbytes or place > len(data):
            raise UserError(f"it is damaged or cut off in storage {_shown(key)}: download it again.")

    def read_storage(storage: Storage) -> bytes | memoryview:
        piece = memoryview(data)[places[storage.key] :][: storage.nbytes]
        return piece if sys.byteorder == "little" else _swapped(piece, storage.dtype)

    return tree, read_storage


def _swapped(data: bytes | memoryview, dtype: np.dtype) -> bytes:
    """The numbers of a storage in the other byte order."""
    width = dtype.itemsize // 2 if dtype.kind == "c" else dtype.itemsize
    return np.frombuffer(data, f"u{width}").byteswap().tobytes()


# ---- Pickles --------------------------------------------------------------------------------

# What pickle's protocols 2 to 5 use for checkpoints. Others name classes in other ways (INST, OBJ, EXT1),
# rearrange the stack (DUP, POP) or hold numbers of any length (LONG, LONG4).
# fmt: off
INSTRUCTIONS = {
    "PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1",
    "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
    "BYTEARRAY8", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
    "EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_SET", "ADDITEMS", "FROZENSET", "BINPUT", "LONG_BINPUT",
    "MEMOIZE", "BINGET", "LONG_BINGET", "GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID",
}
# fmt: on
PUT = ("BINPUT", "LONG_BINPUT", "MEMOIZE")
IN_PLACE = (*PUT, "APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD")  # keep the first operand
PLAIN = -1  # on the checker's stack: may be a key. Any other number is the length of a tuple, else 0


def check_pickle(stream: IO[bytes]) -> None:
    """Reads one pickle up to its end and refuses what `pickle.Unpickler` must not run.

    Hashing a tuple nested 10^6 times overflows the C stack, hashing one that repeats its parts takes
    exponential time, and long integers can be made to collide. So keys and members of sets must be plain,
    and to tell them the stack is simulated. A large memo index allocates gigabytes, and passing one long
    tuple to many calls takes hours.

    Raises:
      UserError: the pickle does one of these, or has an instruction that no checkpoint needs.
    """
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[int, int] = {}
    spent = 0
    argument: Any
    for count, (code, argument, _) in enumerate(pickletools.genops(stream)):
        name, before = code.name, code.stack_before
        if name not in INSTRUCTIONS:
            raise UserError(f"its pickle has the instruction {name}, which PyTorch never writes.")
        if name == "MARK":
            marks.append(len(stack))
            continue
        items: list[int] = []
        if pickletools.markobject in before:
            start = marks.pop()
            items = stack[start:]
            del stack[start:]
            before = before[: before.index(pickletools.markobject)]
        base = len(stack) - (1 if name in PUT else len(before))
        if base < (marks[-1] if marks else 0):
            raise UserError("its pickle is damaged (it takes values that it has not made).")
        operands = stack[base:]
        del stack[base:]
        keys = {"SETITEM": operands[1:2], "SETITEMS": items[::2], "ADDITEMS": items, "FROZENSET": items}
        if any(key != PLAIN for key in keys.get(name, ())):
            raise UserError("its pickle has a key or a member of a set that is not a plain value.")
        if name in ("REDUCE", "NEWOBJ"):
            spent += max(operands[1], 0)
        if count + spent > MAX_INSTRUCTIONS:
            raise UserError(f"its pickle has more than {MAX_INSTRUCTIONS:,} instructions.")
        if name in PUT:
            index = len(memo) if argument is None else argument
            if index > count:
                raise UserError(f"its pickle has the memo index {index:,}, which PyTorch never writes.")
            memo[index] = operands[0]
        if name in IN_PLACE:
            stack.append(operands[0])
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name in ("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET"):
            stack.append(len(items) + len(operands))
        elif name == "LONG1":
            stack.append(PLAIN if abs(argument) < 2**60 else 0)
        elif code.stack_after:
            stack.append(PLAIN)


def _unpickle(stream: io.BytesIO) -> tuple[Any, dict[str, "Storage"]]:
    """The object of the next pickle, and the storages that it refers to by their keys."""
    start = stream.tell()
    check_pickle(stream)
    length = stream.tell() - start
    stream.seek(start)
    unpickler = _Unpickler(io.BytesIO(stream.read(length)))
    return unpickler.load(), unpickler.storages


class _Unpickler(pickle.Unpickler):
    """Runs a checked pickle with inert objects in place of everything that it names.

    `check_pickle` takes what a call returns for a plain value. So a call must never return what it was given,
    but a Tensor, an Opaque, or a Dictionary, which cannot be hashed.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(stream)
        self.storages: dict[str, Storage] = {}
        self.unknown: dict[tuple[str, str], type[Opaque]] = {}

    def find_class(self, module: str, name: str) -> Any:
        full_name = (module, name)
        if full_name in NAMES:
            return NAMES[full_name]
        if full_name not in self.unknown:
            if len(self.unknown) == MAX_UNKNOWN:
                raise UserError(f"its pickle names more than {MAX_UNKNOWN:,} unknown classes.")
            self.unknown[full_name] = type("Opaque", (Opaque,), {"name": f"{module}.{name}"})
        return self.unknown[full_name]

    def persistent_load(self, pid: Any) -> "Storage":
        if type(pid) is not tuple or pid[0] != "storage" or pid[5:] not in ((), (None,)):
            raise UserError("its pickle refers to something that is not a storage.")
        _, dtype, key, _, count = pid[:5]
        if type(dtype) is not str or type(key) is not str or type(count) is not int or not 0 <= count < 2**56:
            raise UserError(f"its pickle has a storage that is not supported ({_kind(dtype)}).")
        storage = Storage(key, DTYPES[dtype], count * DTYPES[dtype].itemsize)
        if self.storages.setdefault(key, storage) != storage:
            raise UserError(f"its pickle describes storage {_shown(key)} in two ways.")
        return storage


class Sealed:
    """Refuses BUILD, with which a pickle could set any attribute."""

    def __setstate__(self, state: Any) -> None:
        raise UserError("its pickle changes something that PyTorch never changes.")


class Function(Sealed):
    """A function of ours that a pickle may call; of a bare function BUILD would set `__defaults__`."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)


class Opaque:
    """An object of a class that is not known here. It takes everything and keeps nothing."""

    name = "unknown"

    def __init__(self, *_: Any) -> None:
        pass

    def ignore(self, *_: Any) -> "Opaque":
        return self

    __call__ = __setstate__ = __setitem__ = append = extend = add = ignore


class Dictionary(dict):
    """An OrderedDict without attributes, as a state dict's `_metadata`."""

    def __init__(self, *items: Any) -> None:
        if items:  # Python 2 did this; nobody has checked such keys
            raise UserError("its pickle makes a dictionary in a way that PyTorch never does.")
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class Storage(Sealed):
    """A stretch of numbers in the file that tensors are views of."""

    key: str
    dtype: np.dtype
    nbytes: int


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor(Sealed):
    """A view of a storage; offset and strides count elements of `dtype`."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    conjugated: bool
    negated: bool

    def __post_init__(self) -> None:
        types = (type(self.storage), type(self.shape), type(self.strides))
        if types != (Storage, tuple, tuple) or len(self.shape) != len(self.strides) or len(self.shape) > 32:
            raise UserError("its pickle has a tensor with wrong properties.")
        numbers = (self.offset, *self.shape, *self.strides)
        if not all(type(number) is int and 0 <= number < 2**56 for number in numbers):
            raise UserError("its pickle has a tensor with wrong properties.")
        span = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        if self.nbytes and (self.offset + span + 1) * self.dtype.itemsize > self.storage.nbytes:
            raise UserError(f"a tensor of shape {_shown(str(self.shape))} reaches beyond its storage.")

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def array(self, data: np.ndarray) -> np.ndarray:
        """The tensor as a view of its storage's bytes, uint8 [n], or a changed copy."""
        if not self.nbytes:
            return np.empty(self.shape, self.dtype)
        size = self.dtype.itemsize
        strides = [stride * size for stride in self.strides]
        array: np.ndarray = np.ndarray(self.shape, self.dtype, data, self.offset * size, strides)
        array = array.conj() if self.conjugated else array
        return -array if self.negated else array


def _tensor_v2(
    storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, flags: Any = None
) -> Tensor:
    """torch._utils._rebuild_tensor_v2"""
    return _tensor_v3(storage, offset, shape, strides, grad, hooks, storage.dtype.name, flags)


def _tensor_v3(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    _grad: Any,
    _hooks: Any,
    dtype: Any,
    flags: Any = None,
) -> Tensor:
    """torch._utils._rebuild_tensor_v3: the storage holds bytes."""
    if type(dtype) is not str:  # hashing anything else is not safe
        raise UserError(f"its pickle has a tensor whose type is not supported ({_kind(dtype)}).")
    conjugated, negated = (isinstance(flags, dict) and bool(flags.get(flag)) for flag in ("conj", "neg"))
    return Tensor(storage, DTYPES[dtype], offset, shape, strides, conjugated, negated)


def _parameter(data: Any, _grad: Any, _hooks: Any, _state: Any = None) -> Any:
    """torch._utils._rebuild_parameter: a parameter is its tensor."""
    if not isinstance(data, (Tensor, Opaque)):
        raise UserError("its pickle has a parameter that is no tensor.")
    return data


def _tensor_of_type(function: Any, kind: Any, arguments: Any, _state: Any) -> Any:
    """torch._tensor._rebuild_from_type_v2: a tensor with attributes, or of a class that is not known here."""
    if isinstance(kind, type) and issubclass(kind, Opaque):
        return kind()
    if not isinstance(function, Function) or function.function is _tensor_of_type:
        raise UserError("its pickle has a tensor with wrong properties.")
    return function(*arguments)


NAMES: dict[tuple[str, str], Any] = {  # strings are inert, too
    ("collections", "OrderedDict"): Dictionary,
    ("torch._utils", "_rebuild_tensor_v2"): Function(_tensor_v2),
    ("torch._utils", "_rebuild_tensor_v3"): Function(_tensor_v3),
    ("torch._utils", "_rebuild_parameter"): Function(_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): Function(_parameter),
    ("torch._tensor", "_rebuild_from_type_v2"): Function(_tensor_of_type),
    ("torch", "Tensor"): "tensor",
    ("torch._tensor", "Tensor"): "tensor",
    ("torch.nn.parameter", "Parameter"): "tensor",
    ("torch.storage", "UntypedStorage"): "uint8",
    **{("torch", name): name for name, _, _ in ELEMENTS},
    **{
        (module, storage): name
        for module in ("torch", "torch.cuda")
        for name, storage, _ in ELEMENTS
        if storage
    },
}
