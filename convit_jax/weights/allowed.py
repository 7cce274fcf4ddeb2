"""The names that a checkpoint's pickle may use, and what each becomes here: data, nothing else.

A checkpoint names classes and functions of PyTorch, NumPy and the standard library, to be called
with arguments when it is loaded. None of them is imported or called here. For each name of the
table a few lines of ours check the arguments and make a plain value of the same content; a name
that is not in the table is refused. What PyTorch attaches beside the numbers (gradient flags,
hooks, `_metadata`, devices) is dropped or becomes text.
"""

import pathlib
import re
from collections import Counter
from functools import partial

import numpy as np

from convit_jax.errors import UserError
from convit_jax.weights import dtypes
from convit_jax.weights.tensors import Storage, Tensor
from convit_jax.weights.unpickler import Call, check_key, quoted


class Ordered(dict):
    """An OrderedDict or its kin, whose attributes (a state dict's `_metadata`) are dropped."""

    def build(self, state):
        pass


class Namespace(dict):
    """argparse.Namespace: its attributes."""

    def build(self, state):
        if not isinstance(state, dict):
            raise TypeError
        self.update(state)


class NumpyType:
    """numpy.dtype; its byte order comes after."""

    def __init__(self, code, *_):
        if not re.fullmatch(r"\?|b1|[iu][1248]|f[248]|c8|c16", code):
            raise UserError(f"it holds a NumPy array of type {quoted(code)}; only numbers are read.")
        self.dtype = np.dtype(code)

    def build(self, state):
        if type(state) is not tuple or state[1] not in ("<", ">", "=", "|"):
            raise TypeError
        self.dtype = self.dtype.newbyteorder(state[1])


class NumpyArray:
    """numpy.ndarray; its contents come after."""

    array = None

    def build(self, state):
        _, shape, dtype, is_fortran, data = state
        data = data.encode() if type(data) is str else data  # Python 2
        self.array = numpy_array(data, dtype, shape, "F" if is_fortran else "C").array


def numpy_array(data, dtype, shape, order):
    """numpy._core.numeric._frombuffer, and what every array comes to."""
    if type(data) is not bytes or type(dtype) is not NumpyType or not is_shape(shape):
        raise TypeError
    result = NumpyArray()
    result.array = np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if order == "F" else "C")
    return result


def is_shape(shape):
    return type(shape) is tuple and len(shape) <= 64 and all(type(n) is int and n >= 0 for n in shape)


def numpy_scalar(dtype, data):
    """numpy._core.multiarray.scalar"""
    data = data.encode() if type(data) is str else data  # Python 2
    return numpy_array(data, dtype, (1,), "C").array[0]


def numpy_reconstruct(*_):
    """numpy._core.multiarray._reconstruct: an empty array that is filled later."""
    return NumpyArray()


def ordered(items=()):
    """collections.OrderedDict and Counter: from pairs or from a dictionary."""
    pairs = items.items() if isinstance(items, dict) else items
    return Ordered((check_key(key), value) for key, value in pairs)


def counter(counts=()):
    return ordered(counts if isinstance(counts, dict) else Counter(map(check_key, counts)))


def namespace():
    return Namespace()


def default_dict(_=None):
    return Ordered()


def set_of(items=()):
    return set(map(check_key, items))


def encode(text, encoding):
    """_codecs.encode: how protocol 2 stores bytes."""
    if encoding not in ("latin1", "latin-1"):
        raise ValueError
    return text.encode("latin1")


def byte_string(data=b"", encoding="latin-1"):
    """bytes and bytearray as protocol 2 has them; never of a number, which would be a length."""
    if type(data) not in (bytes, str):
        raise TypeError
    return encode(data, encoding) if type(data) is str else data


def complex_number(real, imaginary=0.0):
    if type(real) not in (int, float) or type(imaginary) not in (int, float):
        raise TypeError
    return complex(real, imaginary)


def path(flavour, *parts):
    """pathlib's paths, as text."""
    return str(flavour(*parts))


def device(kind, index=None):
    """torch.device, as text: "cuda:0"."""
    if type(kind) is not str or type(index) not in (int, type(None)):
        raise TypeError
    return kind if index is None else f"{kind}:{index}"


def size(shape=()):
    """torch.Size"""
    if not is_shape(shape):
        raise TypeError
    return shape


def layout(name):
    """torch.serialization._get_layout"""
    if name != "torch.strided":
        raise UserError(f"it holds a tensor of layout {quoted(name)}; only dense ones are read.")
    return name


def tensor(storage, offset, shape, strides, *_):
    """torch._utils._rebuild_tensor; what follows in _v2 is about gradients, hooks and metadata."""
    return view(storage, storage.dtype, offset, shape, strides)


def tensor_v2(storage, offset, shape, strides, _requires_grad, _hooks, metadata=None):
    return view(storage, storage.dtype, offset, shape, strides, metadata)


def tensor_v3(storage, offset, shape, strides, _requires_grad, _hooks, dtype, metadata=None):
    return view(storage, dtype, offset, shape, strides, metadata)


def view(storage, dtype, offset, shape, strides, metadata=None):
    if type(storage) is not Storage or not isinstance(dtype, np.dtype):
        raise TypeError
    if type(shape) is not tuple or type(strides) is not tuple:
        raise TypeError
    flags = metadata or {}
    conjugate, negative = bool(flags.get("conj")), bool(flags.get("neg"))
    if (conjugate or negative) and dtype.kind != "c":  # PyTorch's lazy conj() and imag
        raise TypeError
    return Tensor(storage, dtype, offset, shape, strides, conjugate, negative)


def parameter(data, *_):
    """torch._utils._rebuild_parameter: a parameter is its tensor."""
    if type(data) is not Tensor:
        raise TypeError
    return data


def from_type(function, _type, arguments, _state):
    """torch._tensor._rebuild_from_type_v2: a tensor that carries Python attributes, dropped here."""
    if function.function not in (tensor, tensor_v2, tensor_v3, parameter):
        raise TypeError
    return parameter(function.function(*arguments))


def storage_id(identity):
    """("storage", type, key, location, number of elements[, view]): the Storage that is meant."""
    kind, dtype, key, _location, count, *rest = identity
    if kind != "storage":
        raise UserError(f"its pickle refers to {quoted(kind)} outside of it; only storages are read.")
    if not isinstance(dtype, np.dtype) or type(key) is not str or type(count) is not int or count < 0:
        raise UserError("its pickle is damaged (a storage with wrong properties).")
    storage = Storage(key, dtype, count * dtype.itemsize)
    if rest and rest[0] is not None:  # a view of a storage, in files of 2017
        _, offset, count = rest[0]
        if type(offset) is not int or type(count) is not int or min(offset, count) < 0:
            raise UserError("its pickle is damaged (a storage's view with wrong properties).")
        if (offset + count) * dtype.itemsize > storage.nbytes:
            raise UserError("its pickle is damaged (a storage's view reaches beyond it).")
        return storage, Storage(key, dtype, count * dtype.itemsize, offset * dtype.itemsize)
    return storage, storage


CALLS = {
    "collections.OrderedDict": ordered,
    "collections.Counter": counter,
    "collections.defaultdict": default_dict,
    "argparse.Namespace": namespace,
    "types.SimpleNamespace": namespace,
    "builtins.set": set_of,
    "builtins.frozenset": set_of,
    "builtins.bytes": byte_string,
    "builtins.bytearray": byte_string,
    "builtins.complex": complex_number,
    "_codecs.encode": encode,
    "torch.Size": size,
    "torch.device": device,
    "torch.serialization._get_layout": layout,
    "torch.nn.parameter.Parameter": parameter,
    "torch._utils._rebuild_tensor": tensor,
    "torch._utils._rebuild_tensor_v2": tensor_v2,
    "torch._utils._rebuild_tensor_v3": tensor_v3,
    "torch._utils._rebuild_parameter": parameter,
    "torch._utils._rebuild_parameter_with_state": parameter,
    "torch._tensor._rebuild_from_type_v2": from_type,
    "numpy.dtype": NumpyType,
}
for _module in ("numpy.core", "numpy._core"):
    CALLS[f"{_module}.multiarray.scalar"] = numpy_scalar
    CALLS[f"{_module}.multiarray._reconstruct"] = numpy_reconstruct
    CALLS[f"{_module}.numeric._frombuffer"] = numpy_array
for _module in ("pathlib", "pathlib._local"):
    for _kind in ("Path", "PosixPath", "PurePath", "PurePosixPath"):
        CALLS[f"{_module}.{_kind}"] = partial(path, pathlib.PurePosixPath)
    for _kind in ("WindowsPath", "PureWindowsPath"):
        CALLS[f"{_module}.{_kind}"] = partial(path, pathlib.PureWindowsPath)

VALUES = {  # names that are never called
    **{f"torch.{name}": dtype for name, dtype in dtypes.TORCH.items()},
    **{f"torch.{name}": dtype for name, dtype in dtypes.STORAGE.items()},
    **{f"torch.cuda.{name}": dtype for name, dtype in dtypes.STORAGE.items()},
    "torch.storage.UntypedStorage": np.dtype(np.uint8),
    "torch.storage._UntypedStorage": np.dtype(np.uint8),
    "torch.UntypedStorage": np.dtype(np.uint8),
    "torch.Tensor": "torch.Tensor",
    "torch._tensor.Tensor": "torch.Tensor",
    "numpy.ndarray": "numpy.ndarray",
    **{f"builtins.{name}": f"builtins.{name}" for name in ("dict", "list", "int", "float", "str", "bool")},
}
TABLE = {**VALUES, **{name: Call(name, function) for name, function in CALLS.items()}}


def find(module, name):
    """What a name of the pickle stands for.

    Raises:
      UserError: it is not in the table; the sentence names it.
    """
    module = {"__builtin__": "builtins"}.get(module, module)
    full_name = f"{module}.{name}"
    if full_name not in TABLE:
        raise UserError(
            f"it asks for {quoted(full_name)[1:-1]}, which is not among the tensors and plain containers "
            "of a checkpoint, so nothing of it was run: if you trust its source, load it with PyTorch "
            "and save the model's state_dict() alone."
        )
    return TABLE[full_name]
