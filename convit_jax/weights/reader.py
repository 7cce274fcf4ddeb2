"""Reads .pth, .pt and .safetensors without PyTorch and without running anything.

The kind of file is told by its first bytes, not by its name. A pickle is interpreted as data
(torch_file.py, unpickler.py, allowed.py) and gives tensors that know where their numbers lie; those
that are asked for are then read, each storage once, straight to where they are wanted. So memory is
what is asked for, never more than the file. What is wrong is said in one sentence.
"""

import collections
import contextlib
import os
import re

import numpy as np

from convit_jax.errors import UserError, explained
from convit_jax.weights import safetensors_file, torch_file
from convit_jax.weights.allowed import NumpyArray, NumpyType, Ordered
from convit_jax.weights.stored import Held, Stored, lies_as_it_is
from convit_jax.weights.tensors import Storage, Tensor, read_bytes
from convit_jax.weights.unpickler import Call, quoted

MAX_DEPTH = 100  # of containers in containers
MAX_VALUES = 10_000_000  # all values, those of a container that stands in several places counted each time
PLACES = ("model", "state_dict", "model_state_dict")  # where checkpoints keep the model's state dict
EMA_PLACES = ("model_ema", "state_dict_ema")  # of the authors' and of timm's training
PREFIXES = ("module.", "_orig_mod.")  # of torch's DataParallel and of torch.compile


def read(path):
    """What torch.load or safetensors' load_file would give, as plain Python.

    Tensors and parameters are NumPy arrays (bfloat16 and float8 as ml_dtypes has them) that share
    memory where the tensors did; ordered dictionaries and namespaces are dicts, torch.Size is a
    tuple, paths and devices are text, element types NumPy's.

    Raises:
      UserError: it cannot be read, is damaged, or holds more than tensors and plain containers.
    """
    with opened(path) as (_, tree, plain):
        return plain.value(tree)


def open_state_dict(path, places=None):
    """The model's tensors in a file, {name: Stored or array} in the file's order.

    The state dict may be the whole file or stand under "model", "state_dict" or
    "model_state_dict"; `places` names others, as EMA_PLACES. `module.` before every name, as
    DataParallel writes it, is taken off. The numbers of a Stored are read whenever they are asked for;
    a tensor that does not lie in the file as it is, or shares its storage, is read now.

    Raises:
      UserError: as read; or the file holds no state dict there, and the sentence says what it holds.
    """
    with opened(path) as (file, tree, plain):
        found = find_state_dict(tree, places)
        uses = collections.Counter(item.storage.key for item in found.values() if isinstance(item, Tensor))
        held, stored = Held(path, file), {}
        for name, item in found.items():
            if isinstance(item, Tensor) and uses[item.storage.key] == 1:
                span = plain.locate(item.storage)
                if lies_as_it_is(item, span):
                    stored[name] = Stored(held, span, item.shape, item.dtype)
        arrays = plain.value({name: item for name, item in found.items() if name not in stored})
        return without_prefixes({name: stored[name] if name in stored else arrays[name] for name in found})


def without_prefixes(tensors):
    """The same tensors without what stands before every name."""
    while any(all(name.startswith(prefix) for name in tensors) for prefix in PREFIXES):
        tensors = {name.partition(".")[2]: array for name, array in tensors.items()}
    return tensors


@contextlib.contextmanager
def opened(path):
    """(file, tree, plain): open, its object, in which tensors are not read yet, and a Plain to read them."""
    with explained(path), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        tree, locate = open_any(file, size)
        yield file, tree, Plain(file, locate, size)


def open_any(file, size):
    """(object, locate) of a file, by the kind that its first bytes tell; locate(storage) -> Span."""
    head = read_bytes(file, 0, min(size, 512)).tobytes()
    file.seek(0)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if not head:
        raise UserError("it is empty: fetch it again.")
    if head.startswith(b"PK\x03\x04"):
        return torch_file.open_zip(file, size)
    if head[8:9] == b"{" and b"\0" in head[:8]:  # a text has no zero byte, the header's length has some
        return safetensors_file.open_tensors(file, size)
    if head.startswith(b"version https://git-lfs"):
        raise UserError("it is a Git LFS pointer, not the file itself: fetch that with `git lfs pull`.")
    if text.startswith(b"<"):
        raise UserError("it is a web page, perhaps an error message: fetch the file again.")
    if text.startswith((b"{", b"[")):
        raise UserError("it is JSON text, perhaps an error message: fetch the file again.")
    if head[257:262] == b"ustar" or re.match(rb"(sys_info|pickle|storages|tensors)\0", head):
        raise UserError(
            "it has the tar format of PyTorch before 2017: load and save it with a newer PyTorch."
        )
    if head.startswith(b"\x80"):
        return torch_file.open_stream(file, size)
    raise UserError("it is neither a PyTorch checkpoint (.pth, .pt) nor a safetensors file, or is damaged.")


class Plain:
    """Makes plain values of what a pickle held: reads its tensors, each storage once.

    A few bytes of pickle can describe values without end (lists of lists of the same list, tensors
    that repeat one number by stride 0), so depth, number of values and bytes are bounded.
    """

    def __init__(self, file, locate, size):
        self.file, self.locate, self.data, self.done = file, locate, {}, {}
        self.bytes_left = 4 * size + 2**24

    def value(self, item):
        return self.convert(item, 0)[0]

    def convert(self, item, level):
        """(plain value, number of values in it, its depth)."""
        if isinstance(item, (str, bytes, int, float, complex, type(None))):
            return item, 1, 0
        if id(item) in self.done:
            return self.done[id(item)][1:]
        if level > MAX_DEPTH:
            raise UserError(f"its containers nest deeper than {MAX_DEPTH} levels.")
        count, depth = 1, 0
        if isinstance(item, dict):
            parts = {key: self.convert(value, level + 1) for key, value in item.items()}
            value = {key: part[0] for key, part in parts.items()}
            parts = parts.values()
        elif isinstance(item, (list, tuple)):
            parts = [self.convert(value, level + 1) for value in item]
            value = type(item)(part[0] for part in parts)
        else:
            parts, value = (), self.leaf(item)
        for _, inner_count, inner_depth in parts:
            count, depth = count + inner_count, max(depth, inner_depth + 1)
        if depth > MAX_DEPTH:
            raise UserError(f"its containers nest deeper than {MAX_DEPTH} levels.")
        if count > MAX_VALUES:
            raise UserError(f"its containers repeat each other to more than {MAX_VALUES:,} values.")
        self.done[id(item)] = (item, value, count, depth)  # the item is kept: its id stays its own
        return value, count, depth

    def leaf(self, item):
        if isinstance(item, Storage):
            count = item.nbytes // item.dtype.itemsize
            item = Tensor(item, item.dtype, 0, (count,), (1,))
        if isinstance(item, Tensor):
            self.bytes_left -= item.nbytes
            if self.bytes_left < 0:
                raise UserError("its tensors repeat a few numbers to far more than the file's size.")
            key = item.storage.key
            if key not in self.data and item.nbytes:
                self.data[key] = self.locate(item.storage).read(self.file)
            return item.array(self.data.get(key))
        if isinstance(item, NumpyType):
            return item.dtype
        if isinstance(item, NumpyArray):
            if item.array is None:
                raise UserError("its pickle is damaged (a NumPy array without contents).")
            return item.array
        return item.name if isinstance(item, Call) else item


def find_state_dict(tree, places=None):
    """The dictionary of tensors by name in a file's object; see open_state_dict."""
    if places is None and is_state_dict(tree):
        return tree
    if isinstance(tree, dict):
        for place in places or PLACES:
            if is_state_dict(tree.get(place)):
                return tree[place]
    where = " or ".join(map(repr, places or PLACES))
    whole = "" if places else ", neither as a whole nor"
    raise UserError(f"it has no state dict{whole} under {where}: it holds {described(tree)}.")


def is_state_dict(item):
    return (
        isinstance(item, dict)
        and len(item) > 0
        and all(type(name) is str for name in item)
        and all(isinstance(value, (Tensor, NumpyArray, np.ndarray)) for value in item.values())
    )


def described(tree):
    """What a file holds, for a sentence: 'epoch (int), args (Namespace), ...'."""
    if not isinstance(tree, dict):
        return f"one {type(tree).__name__}"
    words = {Tensor: "tensor", Ordered: "dictionary", dict: "dictionary", NumpyArray: "array"}
    entries = [
        f"{quoted(name)} ({words.get(type(value), type(value).__name__)})" for name, value in tree.items()
    ]
    if not entries:
        return "an empty dictionary"
    return ", ".join(entries[:8]) + (f" and {len(entries) - 8} more" if len(entries) > 8 else "")
