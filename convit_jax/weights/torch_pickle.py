"""Reads the pickles in PyTorch's checkpoints without importing or calling anything that they name.

A pickle is a program for a stack machine. `pickletools` decodes it, and `unpickle` runs the instructions that
checkpoints need. Of the classes and functions that a pickle names, only those in NAMES have a meaning. Tensors
become `Tensor` objects, whose numbers are read later.
"""

import dataclasses
import math
import pickletools
from types import FunctionType, NoneType
from typing import IO, Any

import ml_dtypes  # noqa: F401  (registers bfloat16 and float8 with NumPy)
import numpy as np

from convit_jax.errors import UserError, printable

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
MAX_INSTRUCTIONS = 200_000  # a training checkpoint of ConViT-B with optimizer and EMA has about 30,000


def damaged(reason: str) -> UserError:
    """The error for a file that PyTorch would not write."""
    return UserError(f"it is damaged ({reason}): download or save it again.")


def kind_of(value: Any) -> str:
    if isinstance(value, Unknown):
        return printable(f"{value.module}.{value.name}")
    return "dictionary" if isinstance(value, dict) else type(value).__name__


@dataclasses.dataclass(frozen=True)
class Unknown:
    """A class or function without a meaning here, and whatever it makes. It takes everything and keeps nothing."""

    module: str
    name: str


@dataclasses.dataclass(frozen=True)
class Storage:
    """A stretch of numbers in the file that tensors are views of."""

    key: str
    dtype: np.dtype
    nbytes: int


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
    """A view of a storage; offset and strides count elements of `dtype`."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.dtype, np.dtype):
            raise damaged(f"its pickle has a tensor of an unknown type: {kind_of(self.dtype)}")
        if (type(self.storage), type(self.shape), type(self.strides)) != (Storage, tuple, tuple):
            raise damaged("its pickle has a tensor with wrong properties")
        numbers = (self.offset, *self.shape, *self.strides)
        if len(self.shape) > 64 or not all(type(number) is int and 0 <= number < 2**56 for number in numbers):
            raise damaged("its pickle has a tensor with wrong properties")
        span = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        if self.nbytes and (self.offset + span + 1) * self.dtype.itemsize > self.storage.nbytes:
            raise damaged(f"a tensor of shape {printable(str(self.shape))} reaches beyond its storage")

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def array(self, data: bytes | memoryview) -> np.ndarray:
        """The tensor as a view of its storage's bytes."""
        if not self.nbytes:
            return np.empty(self.shape, self.dtype)
        size = self.dtype.itemsize
        return np.ndarray(self.shape, self.dtype, data, self.offset * size, [stride * size for stride in self.strides])


def unpickle(stream: IO[bytes]) -> tuple[Any, dict[str, Storage]]:
    """The object of the next pickle, and the storages that it refers to by their keys.

    The object consists of plain values, lists, tuples, dictionaries with plain keys, and the classes above.
    """
    stack: list[Any] = []
    below: list[list[Any]] = []  # the stack under each mark
    memo: dict[Any, Any] = {}
    storages: dict[str, Storage] = {}
    taken: list[Any] = []  # what an instruction takes off the stack
    for count, (instruction, argument, _) in enumerate(pickletools.genops(stream)):
        if count == MAX_INSTRUCTIONS:
            raise damaged(f"its pickle has more than {MAX_INSTRUCTIONS:,} instructions")
        taken, operands = [], instruction.stack_before
        if pickletools.markobject in operands:  # everything above the mark, and the operands before it
            taken, stack = stack, below.pop()
            operands = operands[: operands.index(pickletools.markobject)]
        taken = [stack.pop() for _ in operands][::-1] + taken
        match instruction.name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                below.append(stack)
                stack = []
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = taken[0]
                stack.append(taken[0])
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "BINPERSID":
                storage = _storage(taken[0])
                if storages.setdefault(storage.key, storage) != storage:
                    raise damaged(f"its pickle describes storage {printable(storage.key)} in two ways")
                stack.append(storage)
            case name:
                stack.append(_result(name, argument, taken))
    return taken[0], storages


def _result(name: str, argument: Any, taken: list[Any]) -> Any:
    """What an instruction puts on the stack, given its argument in the file and what it took off the stack."""
    match name, taken:
        case "NONE", []:
            return None
        case "NEWTRUE" | "NEWFALSE", []:
            return name == "NEWTRUE"
        case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT", []:
            return argument
        case "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8", []:
            return argument
        case "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8" | "BYTEARRAY8", []:
            return argument
        case "EMPTY_TUPLE" | "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3", items:
            return tuple(items)
        case "EMPTY_LIST", []:
            return []
        case "EMPTY_DICT", []:
            return {}
        case "EMPTY_SET" | "FROZENSET", _:
            return Unknown("builtins", "set")
        case "APPEND" | "APPENDS", [list(target), *items]:
            target.extend(items)
            return target
        case "SETITEM" | "SETITEMS", [dict(target), *items]:
            _set_items(target, items[::2], items[1::2])
            return target
        case "BUILD", [dict(target), _]:  # attributes of an OrderedDict
            return target
        case "APPEND" | "APPENDS" | "SETITEM" | "SETITEMS" | "ADDITEMS" | "BUILD", [Unknown() as target, *_]:
            return target
        case "GLOBAL", []:
            module, name = argument.split(" ", 1)
            return NAMES.get((module, name), Unknown(module, name))
        case "STACK_GLOBAL", [str(module), str(name)]:
            return NAMES.get((module, name), Unknown(module, name))
        case "REDUCE" | "NEWOBJ", [Unknown() as function, _]:
            return function
        case "REDUCE", [FunctionType() as function, tuple(arguments)]:  # all functions here are those in NAMES
            return function(*arguments)
    raise damaged(f"its pickle uses the instruction {name} as PyTorch never does")


def _set_items(target: dict[Any, Any], keys: list[Any], values: list[Any]) -> None:
    """Fills a dictionary whose keys are plain values.

    Hashing a tuple nested 10^6 times overflows the C stack, hashing one that repeats its parts takes
    exponential time, and long integers can be made to collide.
    """
    for key in keys:
        plain = isinstance(key, (str, bytes, int, float, NoneType, Unknown))
        if not plain or (isinstance(key, int) and abs(key) >= 2**60):
            raise damaged("its pickle has a dictionary key that is not a plain value")
    target.update(zip(keys, values, strict=True))


def _storage(pid: Any) -> Storage:
    """The storage that a persistent identifier describes."""
    match pid:
        case ("storage", kind, str(key), _, int(count), *view) if view in ([], [None]):
            if not isinstance(kind, np.dtype) or not 0 <= count < 2**56:
                raise damaged(f"its pickle has a storage of an unknown type: {kind_of(kind)}")
            return Storage(key, kind, count * kind.itemsize)
    raise damaged("its pickle refers to something that is not a storage")


# ---- What a pickle may call: the functions of the same names in NAMES -----------------------


def _tensor_v2(storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, flags: Any = None) -> Any:
    return _tensor_v3(storage, offset, shape, strides, grad, hooks, storage.dtype, flags)


def _tensor_v3(
    storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, dtype: Any, flags: Any = None
) -> Any:
    """A tensor whose element type is not that of the storage."""
    if isinstance(flags, dict) and (flags.get("conj") or flags.get("neg")):
        return Unknown("torch", "Tensor with a lazy conj() or neg()")
    return Tensor(storage, dtype, offset, shape, strides)


def _tensor_of_type(function: Any, kind: Any, arguments: Any, _state: Any) -> Any:
    """A tensor with attributes, or of a class that is not known here."""
    return kind if isinstance(kind, Unknown) else _result("REDUCE", None, [function, arguments])


NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): lambda: {},
    ("torch._utils", "_rebuild_tensor_v2"): _tensor_v2,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
    ("torch._utils", "_rebuild_parameter"): lambda data, _grad, _hooks: data,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda data, _grad, _hooks, _state: data,
    ("torch._tensor", "_rebuild_from_type_v2"): _tensor_of_type,
    ("torch", "Tensor"): Tensor,
    ("torch._tensor", "Tensor"): Tensor,
    ("torch.nn.parameter", "Parameter"): Tensor,
    ("torch.storage", "UntypedStorage"): np.dtype("uint8"),
    **{("torch", name): np.dtype(name) for name, _, _ in ELEMENTS},
    **{(module, kind): np.dtype(name) for module in ("torch", "torch.cuda") for name, kind, _ in ELEMENTS if kind},
}
