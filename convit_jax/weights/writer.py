"""The way back: arrays -> .pth as torch.save writes it, or .safetensors.

The .pth is the zip format: a pickle of OrderedDict(name -> _rebuild_tensor_v2(storage, ...)), spelled
out below instruction by instruction since no PyTorch is here to pickle, and one stored member per
tensor, at multiples of 64 bytes so that it can be mapped. torch.load(weights_only=True) reads it.
"""

import contextlib
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np

from convit_jax.errors import UserError
from convit_jax.weights import dtypes, safetensors_file
from convit_jax.weights.safetensors_file import pieces
from convit_jax.weights.stored import Stored

ALIGNMENT = 64
TORCH_NAMES = {np.dtype(dtype): (name, storage) for name, storage, _, dtype in dtypes.TABLE}


def write(path, tensors):
    """Write {name: array or Stored} to a .pth, .pt or .safetensors file, in this order; whole or not at all.

    Raises:
      UserError: another suffix, an element type that the format lacks, or a disk that does not take it.
    """
    path = Path(path)
    writers = {".pth": write_zip, ".pt": write_zip, ".safetensors": safetensors_file.write}
    if path.suffix not in writers:
        raise UserError(f"{path} does not end in .pth, .pt or .safetensors: give a name that does.")
    tensors = {name: native(array) for name, array in tensors.items()}
    for name, array in tensors.items():
        if array.dtype not in TORCH_NAMES:
            raise UserError(f"PyTorch has no element type for {name!r} ({array.dtype}): convert it first.")
    with whole_file(path) as file:
        writers[path.suffix](file, tensors)


@contextlib.contextmanager
def whole_file(path):
    """A new file, open for bytes, that gets its name when it is complete and on the disk.

    Until then, and if anything goes wrong, what was there before stays.

    Raises:
      UserError: the disk does not take it.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror}): check the path, its permissions and room."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(beside)


def native(array):
    """The array in this machine's byte order, which tells apart the same element types."""
    if isinstance(array, Stored):
        return array
    array = np.asarray(array)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def write_zip(file, tensors):
    """torch.save's zip archive of an OrderedDict of contiguous tensors."""
    with zipfile.ZipFile(file, "w") as archive:
        add(archive, "data.pkl", [state_dict_pickle(tensors)])
        add(archive, "byteorder", [b"little"])
        for number, array in enumerate(tensors.values()):
            add(archive, f"data/{number}", pieces(array), array.nbytes)
        add(archive, "version", [b"3\n"])


def add(archive, name, parts, nbytes=0):
    """A stored member of some parts, `nbytes` together if that may be much.

    Its header is padded, as PyTorch's is, so that data begins aligned.
    """
    info = zipfile.ZipInfo(f"archive/{name}")
    wide = nbytes >= 2**31  # needs 20 bytes of header more
    front = archive.fp.tell() + 30 + len(info.filename) + 20 * wide + 4
    padding = -front % ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    with archive.open(info, "w", force_zip64=wide) as member:
        for part in parts:
            member.write(part)


def state_dict_pickle(tensors):
    """The pickle of OrderedDict((name, tensor), ...), whose storages are numbered in this order."""
    parts = [
        pickle.PROTO,
        b"\x02",
        named("collections OrderedDict"),
        pickle.EMPTY_TUPLE,
        pickle.REDUCE,
        pickle.MARK,
    ]
    for number, (name, array) in enumerate(tensors.items()):
        torch_name, storage = TORCH_NAMES[array.dtype]
        strides = [int(np.prod(array.shape[axis + 1 :], dtype=np.int64)) for axis in range(array.ndim)]
        # The newer types have no storage class: their storage counts bytes and the type comes last.
        count = array.size if storage else array.nbytes
        parts += [
            text(name),
            named("torch._utils _rebuild_tensor_v2" if storage else "torch._utils _rebuild_tensor_v3"),
            pickle.MARK,
            group([text("storage"), named(f"torch {storage}" if storage else "torch.storage UntypedStorage"),
                   text(str(number)), text("cpu"), integer(count)]),
            pickle.BINPERSID,
            integer(0),
            group(map(integer, array.shape)),
            group(map(integer, strides)),
            pickle.NEWFALSE,  # requires_grad
            named("collections OrderedDict"), pickle.EMPTY_TUPLE, pickle.REDUCE,  # no hooks
            b"" if storage else named(f"torch {torch_name}"),
            pickle.TUPLE,
            pickle.REDUCE,
        ]  # fmt: skip
    return b"".join([*parts, pickle.SETITEMS, pickle.STOP])


def named(module_and_name):
    return pickle.GLOBAL + module_and_name.replace(" ", "\n").encode() + b"\n"


def text(value):
    data = value.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(data)) + data


def integer(value):
    if value < 2**31:
        return pickle.BININT + struct.pack("<i", value)
    data = pickle.encode_long(value)
    return pickle.LONG1 + bytes([len(data)]) + data


def group(parts):
    return pickle.MARK + b"".join(parts) + pickle.TUPLE
