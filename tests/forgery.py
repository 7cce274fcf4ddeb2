"""Makes checkpoint files that lie: zip archives and pickles with any content, without PyTorch."""

import pickle
import struct
import zlib

TENSOR_V2 = "torch._utils._rebuild_tensor_v2"


def raw_zip(members, method=0, sizes=(), places=()):
    """A zip archive of {name: bytes}; `sizes` and `places` of members may be false."""
    body, directory = b"", b""
    for name, data in members.items():
        packed = zlib.compress(data, wbits=-15) if method else data
        common = struct.pack("<5HL", 20, 0, method, 0, 0, zlib.crc32(data))
        common += struct.pack("<2L", dict(sizes).get(name, len(packed)), dict(sizes).get(name, len(data)))
        common += struct.pack("<2H", len(name), 0)
        place = dict(places).get(name, len(body))
        body += b"PK\3\4" + common + name.encode() + packed
        directory += b"PK\1\2\0\0" + common + struct.pack("<3H2L", 0, 0, 0, 0, place) + name.encode()
    return body + directory + zip_end(len(members), len(directory), len(body))


def zip_end(count, length, place):
    return struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, length, place, 0)


def torch_zip(program, storage=None):
    """A zip archive as torch.save makes it, around a pickle and perhaps the storage "0"."""
    members = {"archive/data.pkl": program}
    if storage is not None:
        members["archive/data/0"] = storage
    return raw_zip(members)


def value(item):
    """The instructions that put a plain value on the stack."""
    return pickle.dumps(item, 2)[2:-1]


def named(name):
    """The instruction that asks for a name: b"ctorch\\nSize\\n" for "torch.Size"."""
    module, _, attribute = name.rpartition(".")
    return b"c%b\n%b\n" % (module.encode(), attribute.encode())


def program(*parts):
    return b"\x80\x02" + b"".join(parts) + b"."


def call(name, *arguments):
    """The pickle that calls a name with plain arguments."""
    return program(named(name), value(arguments), pickle.REDUCE)


def storage(count, key="0", dtype="torch.FloatStorage", more=b""):
    """The instructions for a storage that lies in the file."""
    return b"(" + value("storage") + named(dtype) + value(key) + value("cpu") + value(count) + more + b"tQ"


def tensor(*arguments, of=None, name=TENSOR_V2):
    """The pickle of a tensor made with (offset, shape, strides, ...), of a storage of four numbers."""
    of = storage(4) if of is None else of
    return program(named(name), b"(", of, *map(value, arguments), b"tR")
