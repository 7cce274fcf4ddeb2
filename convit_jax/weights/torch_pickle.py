"""Unpickles what PyTorch's checkpoints hold without importing or calling anything that they name.

A pickle is a program for a small stack machine. The standard library's machine in Python runs it, reduced to the
instructions that checkpoints need, with inert objects in place of every class and function. Tensors become
`Tensor` objects, whose numbers are read later.
"""

import dataclasses
import math
import pickle
import pickletools
from collections.abc import Callable
from typing import IO, Any, ClassVar

import ml_dtypes  # noqa: F401  (registers bfloat16 and float8 with NumPy)
import numpy as np

from convit_jax.errors import UserError

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

MAX_INSTRUCTIONS = 200_000  # a training checkpoint of ConViT-B with optimizer and EMA has about 30,000
MAX_ARGUMENTS = 16  # of a call: passing one long tuple to many calls would take hours
MAX_UNKNOWN = 1_000  # classes and functions
WRONG_TENSOR = "its pickle has a tensor with wrong properties"

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
KEYS: dict[str, Callable[[list[Any]], list[Any]]] = {  # on the stack: keys, or members of a set
    "SETITEM": lambda stack: stack[-2:-1],
    "SETITEMS": lambda stack: stack[::2],
    "ADDITEMS": lambda stack: stack,
    "FROZENSET": lambda stack: stack,
}


def damaged(reason: str) -> UserError:
    """The error for a file that PyTorch would not write."""
    return UserError(f"it is damaged ({reason}): download or save it again.")


def shown(text: str) -> str:
    """Text from the file as it may be printed: short and ASCII only."""
    return ascii(text if len(text) <= 100 else f"{text[:97]}...")[1:-1]


def kind_of(value: Any) -> str:
    if isinstance(value, Opaque):
        return shown(value.name)
    return "dictionary" if isinstance(value, dict) else type(value).__name__


def unpickle(stream: IO[bytes]) -> tuple[Any, dict[str, "Storage"]]:
    """The object of the next pickle, and the storages that it refers to by their keys."""
    unpickler = _Unpickler(stream)
    return unpickler.load(), unpickler.storages


def _checked(name: str, run: Callable[[Any], None]) -> Callable[[Any], None]:
    """An instruction that refuses what would crash or exhaust the interpreter.

    Hashing a tuple nested 10^6 times overflows the C stack, hashing one that repeats its parts takes
    exponential time, and long integers can be made to collide.
    """

    def checked(unpickler: "_Unpickler") -> None:
        unpickler.instructions += 1
        if unpickler.instructions > MAX_INSTRUCTIONS:
            raise damaged(f"its pickle has more than {MAX_INSTRUCTIONS:,} instructions")
        for key in KEYS[name](unpickler.stack) if name in KEYS else ():
            if isinstance(key, (tuple, frozenset)) or (isinstance(key, int) and abs(key) >= 2**60):
                raise damaged("its pickle has a key or a member of a set that is not a plain value")
        if name in ("REDUCE", "NEWOBJ"):
            arguments = unpickler.stack[-1]
            if type(arguments) is not tuple or len(arguments) > MAX_ARGUMENTS:
                raise damaged("its pickle has a call with wrong arguments")
        run(unpickler)

    return checked


class _Unpickler(pickle._Unpickler):
    """Has inert objects in place of everything that a pickle names."""

    dispatch: ClassVar = {
        ord(code.code): _checked(code.name, pickle._Unpickler.dispatch[ord(code.code)])
        for code in pickletools.opcodes
        if code.name in INSTRUCTIONS
    }
    dispatch[pickle.BYTEARRAY8[0]] = dispatch[pickle.BINBYTES8[0]]  # the former reserves the memory first
    stack: list[Any]

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(stream)
        self.instructions = 0
        self.storages: dict[str, Storage] = {}
        self.unknown: dict[tuple[str, str], type[Opaque]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in NAMES:
            return NAMES[module, name]
        if (module, name) not in self.unknown:
            if len(self.unknown) == MAX_UNKNOWN:
                raise damaged(f"its pickle names more than {MAX_UNKNOWN:,} unknown classes")
            self.unknown[module, name] = type("Opaque", (Opaque,), {"name": f"{module}.{name}"})
        return self.unknown[module, name]

    def persistent_load(self, pid: Any) -> "Storage":
        if type(pid) is not tuple or pid[0] != "storage" or pid[5:] not in ((), (None,)):
            raise damaged("its pickle refers to something that is not a storage")
        _, dtype, key, _, count = pid[:5]
        if type(dtype) is not str or type(key) is not str or type(count) is not int or not 0 <= count < 2**56:
            raise damaged(f"its pickle has a storage of an unknown type: {kind_of(dtype)}")
        storage = Storage(key, DTYPES[dtype], count * DTYPES[dtype].itemsize)
        if self.storages.setdefault(key, storage) != storage:
            raise damaged(f"its pickle describes storage {shown(key)} in two ways")
        return storage


class Sealed:
    """Refuses BUILD, with which a pickle could set any attribute."""

    def __setstate__(self, state: Any) -> None:
        raise damaged("its pickle changes something that PyTorch never changes")


@dataclasses.dataclass(frozen=True)
class Function(Sealed):
    """A function of ours that a pickle may call; of a bare function BUILD would set `__defaults__`."""

    function: Callable[..., Any]

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
            raise damaged("its pickle makes a dictionary in a way that PyTorch never does")
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
        if types != (Storage, tuple, tuple) or len(self.shape) != len(self.strides):
            raise damaged(WRONG_TENSOR)
        if not all(type(number) is int and 0 <= number < 2**56 for number in (self.offset, *self.shape, *self.strides)):
            raise damaged(WRONG_TENSOR)
        span = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        if self.nbytes and (self.offset + span + 1) * self.dtype.itemsize > self.storage.nbytes:
            raise damaged(f"a tensor of shape {shown(str(self.shape))} reaches beyond its storage")

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def array(self, data: np.ndarray) -> np.ndarray:
        """The tensor as a view of its storage's bytes, or a changed copy."""
        if not self.nbytes:
            return np.empty(self.shape, self.dtype)
        size = self.dtype.itemsize
        strides = [stride * size for stride in self.strides]
        array: np.ndarray = np.ndarray(self.shape, self.dtype, data, self.offset * size, strides)
        array = array.conj() if self.conjugated else array
        return -array if self.negated else array


# ---- What a pickle may call: the functions of the same names in NAMES -----------------------


def _tensor_v2(storage: Any, offset: Any, shape: Any, strides: Any, grad: Any, hooks: Any, flags: Any = None) -> Tensor:
    return _tensor_v3(storage, offset, shape, strides, grad, hooks, storage.dtype.name, flags)


def _tensor_v3(
    storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, dtype: Any, flags: Any = None
) -> Tensor:
    """A tensor whose element type is not that of the storage."""
    if type(dtype) is not str:  # hashing anything else is not safe
        raise damaged(f"its pickle has a tensor of an unknown type: {kind_of(dtype)}")
    conjugated, negated = (isinstance(flags, dict) and bool(flags.get(flag)) for flag in ("conj", "neg"))
    return Tensor(storage, DTYPES[dtype], offset, shape, strides, conjugated, negated)


def _parameter(data: Any, *_: Any) -> Any:
    if not isinstance(data, (Tensor, Opaque)):
        raise damaged(WRONG_TENSOR)
    return data


def _tensor_of_type(function: Any, kind: Any, arguments: Any, _state: Any) -> Any:
    """A tensor with attributes, or of a class that is not known here."""
    if isinstance(kind, type) and issubclass(kind, Opaque):
        return kind()
    if not isinstance(function, Function) or function.function is _tensor_of_type:
        raise damaged(WRONG_TENSOR)
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
    **{(module, storage): name for module in ("torch", "torch.cuda") for name, storage, _ in ELEMENTS if storage},
}
