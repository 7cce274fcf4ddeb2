"""What torch.save writes: a pickle whose tensors refer to storages that lie beside it in the file.

    zip format (PyTorch >= 1.6)       members ROOT/data.pkl, ROOT/byteorder, and ROOT/data/KEY per storage
    older stream (PyTorch >= 0.1.10)  pickles: magic number, version, machine, object, keys; then the storages

Both are opened alike: the pickle is interpreted now, the storages are checked for place and size
now and read when they are asked for.
"""

import io
import sys

from convit_jax.errors import UserError
from convit_jax.weights import allowed
from convit_jax.weights.archive import Archive
from convit_jax.weights.tensors import Span, read_bytes
from convit_jax.weights.unpickler import Unpickler, quoted

MAGIC, VERSION = 0x1950A86A20F9469CFC6C, 1001


def open_zip(file, size):
    """(object, locate) of PyTorch's zip format; locate(storage) -> Span."""
    archive = Archive(file, size)
    pickles = [name for name in archive.members if name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise UserError("it is a zip archive, but not one that torch.save has written (no data.pkl).")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in archive.members:
        raise UserError("it is a TorchScript program: load it with PyTorch and save its state_dict().")
    order = "little"
    if f"{root}byteorder" in archive.members:
        order = archive.read(f"{root}byteorder").tobytes().decode(errors="replace")
    if order not in ("little", "big"):
        raise UserError(f"its byte order is {quoted(order)}, neither little nor big.")
    storages = {}

    def persistent(identity):
        root_storage, storage = allowed.storage_id(identity)
        key = root_storage.key
        member = archive.members.get(f"{root}data/{key}")
        if member is None:
            raise UserError(f"its storage {quoted(key)} is missing: it is damaged.")
        if member.size != root_storage.nbytes:
            raise UserError(
                f"its storage {quoted(key)} has {member.size:,} bytes and needs {root_storage.nbytes:,}."
            )
        storages.setdefault(key, root_storage)
        return storage

    def locate(storage):
        member = archive.members[f"{root}data/{storage.key}"]
        swap = None if order == sys.byteorder else storages[storage.key].dtype
        return Span(member.start, member.size, member.crc, swap)

    program = archive.read(pickles[0])
    return Unpickler(io.BytesIO(program), len(program), allowed.find, persistent).load(), locate


def open_stream(file, size):
    """(object, locate) of the older format: storages come last, each after its number of elements."""
    storages = {}

    def persistent(identity):
        root_storage, storage = allowed.storage_id(identity)
        known = storages.setdefault(root_storage.key, root_storage)
        if known.nbytes != root_storage.nbytes:
            raise UserError(f"its storage {quoted(known.key)} is said to have two different sizes.")
        return storage

    unpickler = Unpickler(file, size, allowed.find, persistent)
    if unpickler.load() != MAGIC:
        raise UserError("it is a pickle, but not one that torch.save has written.")
    if unpickler.load() != VERSION:
        raise UserError("it is of an unknown version of PyTorch's older format.")
    unpickler.load()  # the machine that wrote it; the numbers are always little-endian
    tree = unpickler.load()
    keys = unpickler.load()
    if (
        type(keys) is not list
        or not all(type(key) is str for key in keys)
        or sorted(keys) != sorted(storages)
    ):
        raise UserError("its list of storages does not fit its tensors: it is damaged.")
    places, place = {}, size - unpickler.left
    for key in keys:
        storage = storages[key]
        if place + 8 + storage.nbytes > size:
            raise UserError(f"it is cut off in storage {quoted(key)}: fetch it again.")
        count = int.from_bytes(read_bytes(file, place, 8).tobytes(), "little", signed=True)
        if count * storage.dtype.itemsize != storage.nbytes:
            raise UserError(f"its storage {quoted(key)} has {count:,} elements, its tensors say otherwise.")
        places[key] = place + 8
        place += 8 + storage.nbytes

    def locate(storage):
        whole = storages[storage.key]
        swap = None if sys.byteorder == "little" else whole.dtype
        return Span(places[storage.key], whole.nbytes, swap=swap)

    return tree, locate
