"""Makes checkpoint files with any content, also false ones, without PyTorch."""

import io
import pickle
import zipfile

import numpy as np

STORAGES = {"float32": "Float", "float64": "Double", "float16": "Half", "int64": "Long"}
TENSOR_V2 = "torch._utils._rebuild_tensor_v2"


def torch_zip(program, storages=(), method=zipfile.ZIP_STORED, **more):
    """A zip archive as torch.save makes it, around a pickle, the storages "0", "1", ..., and more members."""
    members = {"data.pkl": program, **{f"data/{key}": data for key, data in enumerate(storages)}, **more}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(f"archive/{name}", data)
    return file.getvalue()


def save_torch(path, tree):
    """Writes nested dictionaries of arrays and plain values as torch.save does."""
    arrays = []

    def item(entry):
        if isinstance(entry, dict):
            return b"}(" + b"".join(value(name) + item(inside) for name, inside in entry.items()) + b"u"
        if not isinstance(entry, np.ndarray):
            return value(entry)
        array = np.ascontiguousarray(entry)
        arrays.append(array.tobytes())
        strides = tuple(stride // array.itemsize for stride in array.strides)
        return rebuilt(0, array.shape, strides, of=storage(array.size, len(arrays) - 1, array.dtype))

    path.write_bytes(torch_zip(program(item(tree)), arrays))


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
    """The instructions that call a name with plain arguments."""
    return named(name) + value(arguments) + pickle.REDUCE


def storage(count, key=0, dtype="float32", kind=None):
    """The instructions for a storage in the file."""
    kind = kind or f"torch.{STORAGES[str(dtype)]}Storage"
    return b"(" + value("storage") + named(kind) + value(str(key)) + value("cpu") + value(count) + b"tQ"


def rebuilt(*arguments, of=None, name=TENSOR_V2, more=(False, {})):
    """The instructions for a tensor of (offset, shape, strides), by default of a storage of four numbers."""
    of = storage(4) if of is None else of
    return named(name) + b"(" + of + b"".join(map(value, (*arguments, *more))) + b"tR"
