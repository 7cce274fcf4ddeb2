"""Reads state dicts from PyTorch's .pth files and from .safetensors files, without PyTorch.

Only the tensors of the state dict are read. `torch_pickle` explains why a hostile .pth does no harm.
"""

import functools
import io
import os
import sys
import zipfile
from collections.abc import Callable
from typing import IO, Any

import numpy as np
import safetensors

from convit_jax.errors import UserError, explained, printable
from convit_jax.weights.torch_pickle import ELEMENTS, Storage, Tensor, damaged, kind_of, unpickle

PLACES = ("model", "state_dict", "model_state_dict")  # where checkpoints keep the model's state dict
EMA_PLACES = ("model_ema", "state_dict_ema")  # of the authors' and of timm's training
NETWORK = "patch_embed.proj.weight"  # every network here has it; what comes before is a wrapper's prefix
HEAD_WEIGHTS = ("head.weight", "head.bias", "head_dist.weight", "head_dist.bias")
COUNTERS = ("n_averaged", "total_ops", "total_params")  # of torch's AveragedModel and of profilers

SAFETENSORS = {code: np.dtype(name) for name, _, code in ELEMENTS if code}
MAGIC = 0x1950A86A20F9469CFC6C  # begins a file in PyTorch's stream format
StorageReader = Callable[[Storage], bytes | memoryview]


def read_state_dict(path: str | os.PathLike[str], *, ema: bool = False) -> dict[str, np.ndarray]:
    """Returns {name: array, perhaps read-only} of the model in a .pth, .pt, .bin or .safetensors file.

    The state dict lies under one of `PLACES` (with `ema`, the moving average, under one of `EMA_PLACES`), is the
    whole file, or is the only network under another name. Names lose the prefix of a wrapper, as `module.`; a line on
    stderr says what else was left out. Dtypes are the file's, also bfloat16 and float8.
    """
    # Without a buffer, read() makes no second copy.
    with explained(path), open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        tree, read_storage = _open(file, size)
        tensors = _find_state_dict(tree, ema)
        if sum(tensor.nbytes for tensor in tensors.values()) > 4 * size + 2**24:
            raise damaged("its tensors repeat a few numbers to far more than the file's size")
        read_once = functools.cache(read_storage)
        for name, tensor in tensors.items():
            if isinstance(tensor, Tensor):
                tensors[name] = tensor.array(read_once(tensor.storage))
    return tensors


def _open(file: IO[bytes], size: int) -> tuple[Any, StorageReader]:
    """The object in a file and a function that reads its storages."""
    head = file.read(64)
    file.seek(0)
    if head.startswith(b"PK\x03\x04"):
        return _open_zip(file, size)
    if head[8:9] == b"{" and b"\0" in head[:8]:  # eight bytes of a length; a text would have no zero bytes
        return _read_safetensors(file), lambda storage: b""
    if head.startswith(b"\x80"):
        return _open_stream(file)
    raise UserError(
        "it is neither a PyTorch checkpoint (.pth, .pt) nor a safetensors file, perhaps a web page or a Git LFS "
        "pointer: download it again (`git lfs pull`), or save it with PyTorch 0.4 or later."
    )


# ---- The state dict in a checkpoint ---------------------------------------------------------


def _find_state_dict(tree: Any, ema: bool) -> dict[str, Any]:
    """{name: Tensor or array} of the model in a file's object."""
    entries = tree if isinstance(tree, dict) else {}
    places = EMA_PLACES if ema else PLACES
    found = [place for place in places if _tensors(entries.get(place))][:1]
    if not found and not ema:
        if not any(map(_is_network, _tensors(tree))):
            found = [place for place, value in entries.items() if any(map(_is_network, _tensors(value)))]
        if not found and _tensors(tree):
            return _only_weights(entries)
    if len(found) > 1:
        raise UserError(f"it holds several networks ({', '.join(map(str, found))}): save the one you want alone.")
    if found:
        return _only_weights(entries[found[0]])
    where = " or ".join(map(repr, places))
    raise UserError(
        f"it has no state dict {'' if ema else 'as a whole or '}under {where}; it holds {_described(tree)}: "
        "save the model's state_dict()."
    )


def _tensors(value: Any) -> dict[str, Any]:
    """The entries of a dictionary that are tensors."""
    items = value.items() if isinstance(value, dict) else ()
    return {name: entry for name, entry in items if isinstance(entry, (Tensor, np.ndarray)) and type(name) is str}


def _is_network(name: str) -> bool:
    return name == NETWORK or name.endswith(f".{NETWORK}")


def _only_weights(entries: dict[Any, Any]) -> dict[str, Any]:
    """A network's state dict without numbers, counters, the prefix of a wrapper and the wrapper's other tensors."""
    tensors = _tensors(entries)
    others = {name: value for name, value in entries.items() if name not in tensors}
    if unknown := {name: value for name, value in others.items() if not isinstance(value, int | float | str | None)}:
        raise UserError(
            f"its state dict has entries that are no tensors ({_described(unknown)}): "
            "load it with PyTorch and save the tensors alone."
        )
    prefixes = {name.removesuffix(NETWORK) for name in filter(_is_network, tensors)}
    if len(prefixes) > 1:
        names = ", ".join(sorted(prefixes))
        raise UserError(f"it holds several networks (names begin with {names}): save the one you want alone.")
    prefix = prefixes.pop() if prefixes else ""
    found, left_out = {}, [*map(str, others)]
    for name, tensor in tensors.items():
        is_wrappers_head = name in HEAD_WEIGHTS and prefix + name not in tensors
        if (name.startswith(prefix) or is_wrappers_head) and name.rpartition(".")[2] not in COUNTERS:
            found[name.removeprefix(prefix)] = tensor
        else:
            left_out.append(name)
    if left_out:
        print(f"Left out of the state dict: {printable(', '.join(left_out))}", file=sys.stderr)
    return found


def _described(tree: Any) -> str:
    """What an object holds: "'epoch' (int), 'model' (timm.models.convit.ConVit)"."""
    if not isinstance(tree, dict):
        return f"one {kind_of(tree)}"
    entries = [f"'{printable(str(name))}' ({kind_of(value)})" for name, value in list(tree.items())[:8]]
    return ", ".join(entries) + (f" and {len(tree) - 8} more" if len(tree) > 8 else "") or "nothing"


# ---- Formats --------------------------------------------------------------------------------


def _read_safetensors(file: IO[bytes]) -> dict[str, np.ndarray]:
    """Views of the file's content. (The library copies every tensor, and does not read float8.)"""
    data, tensors = file.read(), {}
    place = 8 + int.from_bytes(data[:8], "little")
    with safetensors.safe_open(file.name, "np") as header:  # checks it
        for name in header.offset_keys():  # each tensor begins where the one before it ends
            tensor = header.get_slice(name)
            if tensor.get_dtype() not in SAFETENSORS:
                raise UserError(f"it has tensors of type {tensor.get_dtype()}: save them as another type.")
            tensors[name] = np.ndarray(tensor.get_shape(), SAFETENSORS[tensor.get_dtype()], data, place)
            place += tensors[name].nbytes
    return tensors


def _open_zip(file: IO[bytes], size: int) -> tuple[Any, StorageReader]:
    """PyTorch 1.6 and later: members ROOT/data.pkl, ROOT/byteorder and ROOT/data/KEY per storage."""
    archive = zipfile.ZipFile(file)
    members = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in members if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise UserError(
            "it is a zip archive that torch.save did not write: give the checkpoint inside, or save .npz arrays as "
            ".safetensors."
        )
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in members:
        raise UserError("it is a TorchScript archive: save the state_dict() of torch.jit.load(...) instead.")
    if sum(info.file_size for info in members.values()) > size:
        raise damaged("its members are larger than the file, perhaps compressed as PyTorch never does")
    for info in members.values():
        if not info.CRC:
            del info.CRC  # PyTorch can be told to write no checksums; then zipfile checks none
    if f"{root}byteorder" in members and archive.read(f"{root}byteorder") != b"little":
        raise UserError("it is from a big-endian machine: save it again on another one.")

    def read_storage(storage: Storage) -> bytes:
        name = f"{root}data/{storage.key}"
        if name not in members or members[name].file_size != storage.nbytes:
            raise damaged(f"storage {printable(storage.key)} has not {storage.nbytes:,} bytes")
        return archive.read(name)  # checks the CRC-32

    return unpickle(io.BytesIO(archive.read(pickles[0])))[0], read_storage


def _open_stream(file: IO[bytes]) -> tuple[Any, StorageReader]:
    """PyTorch before 1.6: five pickles (magic number, version, system, object, keys), then the storages."""
    data = file.read()
    stream = io.BytesIO(data)
    if unpickle(stream)[0] != MAGIC or unpickle(stream)[0] != 1001:
        raise UserError("it is a pickle that torch.save did not write: save a state_dict() with torch.save.")
    unpickle(stream)
    tree, storages = unpickle(stream)
    keys, _ = unpickle(stream)
    if type(keys) is not list or not all(type(key) is str for key in keys) or {*keys} != {*storages}:
        raise damaged("its list of storages does not fit its tensors")
    places, place = {}, stream.tell()
    for key in keys:
        storage = storages[key]
        count = int.from_bytes(data[place : place + 8], "little")
        places[key] = place + 8
        place += 8 + storage.nbytes
        if count * storage.dtype.itemsize != storage.nbytes or place > len(data):
            raise damaged(f"cut off in storage {printable(key)}")
    return tree, lambda storage: memoryview(data)[places[storage.key] :][: storage.nbytes]
