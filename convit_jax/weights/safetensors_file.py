"""The safetensors format, read and laid out here: a length, a JSON header, the numbers.

    [8 bytes: n] [n bytes: {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}] [data]

The official package would be one more dependency for fifty lines: its NumPy side lacks float8,
it reports what is wrong in Rust's terms, and reads each tensor through a copy.
"""

import json
import math
import sys

import numpy as np

from convit_jax.errors import UserError
from convit_jax.weights import dtypes
from convit_jax.weights.stored import Stored
from convit_jax.weights.tensors import Span, Storage, Tensor, read_bytes
from convit_jax.weights.unpickler import quoted

MAX_HEADER = 10_000_000  # of a ConViT: 30,000


def open_tensors(file, size):
    """({name: Tensor}, locate) of an open file of `size` bytes, in the header's order; see torch_file."""
    length = int.from_bytes(read_bytes(file, 0, 8).tobytes(), "little")
    if length > size - 8:
        raise UserError(f"its header declares {length:,} bytes, the file has {size - 8:,}.")
    if length > MAX_HEADER:
        raise UserError(f"its header has {length:,} bytes, more than the {MAX_HEADER:,} that are read.")
    entries = parse(read_bytes(file, 8, length).tobytes())
    spans = []
    for name, entry in entries.items():
        spans.append((*check(name, entry), name))
    place = 0
    for begin, end, name in sorted(spans):
        if begin != place:
            problem = "overlaps the one before it" if begin < place else "leaves a gap before it"
            raise UserError(f"the data of {quoted(name)} {problem}.")
        place = end
    if place != size - 8 - length:
        raise UserError(f"its header describes {place:,} bytes of data, the file has {size - 8 - length:,}.")

    places = {name: 8 + length + begin for begin, _, name in spans}

    def tensor(name):
        dtype, shape = dtypes.SAFETENSORS[entries[name]["dtype"]], tuple(entries[name]["shape"])
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        return Tensor(Storage(name, dtype, math.prod(shape) * dtype.itemsize), dtype, 0, shape, strides)

    def locate(storage):
        swap = None if sys.byteorder == "little" else storage.dtype
        return Span(places[storage.key], storage.nbytes, swap=swap)

    return {name: tensor(name) for name in entries}, locate


def parse(header):
    """{name: entry} of the JSON header, without its `__metadata__`."""
    try:
        entries = json.loads(header.decode(), object_pairs_hook=without_repeats)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested beyond reason
        if isinstance(error, UserError):
            raise
        raise UserError("its header is not JSON as safetensors has it.") from error
    if not isinstance(entries, dict):
        raise UserError("its header is not a JSON object.")
    entries.pop("__metadata__", None)
    return entries


def without_repeats(pairs):
    entries = {}
    for name, entry in pairs:
        if name in entries:
            raise UserError(f"its header has {quoted(name)} twice.")
        entries[name] = entry
    return entries


def check(name, entry):
    """(begin, end) of a tensor's data, after checking its entry."""
    shape, dtype, offsets = None, None, None
    if isinstance(entry, dict):
        shape, dtype, offsets = entry.get("shape"), entry.get("dtype"), entry.get("data_offsets")
    for numbers in (shape, offsets):
        if type(numbers) is not list or not all(type(n) is int and 0 <= n < 2**62 for n in numbers):
            raise UserError(f"the header's entry of {quoted(name)} has no proper shape and data_offsets.")
    if not isinstance(dtype, str) or dtype not in dtypes.SAFETENSORS:
        raise UserError(f"{quoted(name)} has the element type {quoted(dtype)}, which is not known here.")
    # An empty tensor's other sizes have no bytes to be checked against, but must be sizes that NumPy takes.
    if len(offsets) != 2 or len(shape) > 64 or math.prod(n or 1 for n in shape) >= 2**56:
        raise UserError(f"the header's entry of {quoted(name)} has no proper shape and data_offsets.")
    nbytes = math.prod(shape) * dtypes.SAFETENSORS[dtype].itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise UserError(f"{quoted(name)} needs {nbytes:,} bytes, its data_offsets are {offsets}.")
    return offsets


def write(file, tensors):
    """Write {name: array} to an open file: the header in the dictionary's order, wider types' data first.

    So every tensor begins at a multiple of its element's size, as the format's own writer does it.
    """
    codes = {np.dtype(dtype): code for _, _, code, dtype in dtypes.TABLE}
    by_width = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)  # stable
    places, place = {}, 0
    for name in by_width:
        places[name] = [place, place + tensors[name].nbytes]
        place += tensors[name].nbytes
    header = {"__metadata__": {"format": "pt"}}
    for name, array in tensors.items():
        if codes.get(array.dtype) is None:
            raise UserError(
                f"safetensors has no element type for {quoted(name)} ({array.dtype}): write a .pth."
            )
        header[name] = {
            "dtype": codes[array.dtype], "shape": list(array.shape), "data_offsets": places[name]
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for name in by_width:
        for piece in pieces(tensors[name]):
            file.write(piece)


def pieces(tensor):
    """The bytes to write of an array or a Stored tensor, the latter a few at a time: uint8 [n] each."""
    if isinstance(tensor, Stored):
        for _, rows in tensor.rows():
            yield little_endian_bytes(rows)
    else:
        yield little_endian_bytes(tensor)


def little_endian_bytes(array):
    """An array's numbers in C order and little-endian, uint8 [n]; not copied if they are so already."""
    dtype = array.dtype if array.dtype.kind == "V" else array.dtype.newbyteorder("<")
    return np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8)
