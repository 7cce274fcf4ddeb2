"""The index of a large data set: arrays in one file, kept between runs and mapped into memory, not read.

An index holds a label and a name for every image, and where its record lies. Making it means a pass
over the data, so it is kept beside the data or, where nothing may be written there, in the user's
cache folder. It carries a fingerprint of the data and is made anew when that has changed. The file
appears under its name only when it is complete. Loader workers map the same file and so share its memory.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path

import numpy as np

MAGIC = "convit_jax index 1"


class Index:
    """Arrays by name, `index["labels"]`; pickles as its file's path where it has one.

    Its records are in the order (label, name), so that the order of training is the same whatever the
    format on the disk.
    """

    def __init__(self, arrays, path=None, fingerprint=None):
        self.arrays, self.path, self.fingerprint = arrays, path, fingerprint

    def __getitem__(self, name):
        return self.arrays[name]

    @property
    def names(self):
        """The names of the records, a sequence of strings."""
        return Names(self["text"], self["starts"])

    def __reduce__(self):
        if self.path is None:
            return Index, (self.arrays,)
        return _read, (self.path, self.fingerprint)


class Indexed:
    """What a source with a self.index has of it."""

    @property
    def labels(self):
        return self.index["labels"]

    @property
    def names(self):
        return self.index.names

    def __len__(self):
        return len(self.labels)


class Names:
    """A sequence of strings in two arrays: UTF-8 bytes uint8 [m], and int64 [n + 1] where each begins."""

    def __init__(self, text, starts):
        self.text, self.starts = text, starts

    def __len__(self):
        return len(self.starts) - 1

    def __getitem__(self, number):
        number = range(len(self))[number]
        return os.fsdecode(self.text[self.starts[number] : self.starts[number + 1]].tobytes())

    @staticmethod
    def pack(names):
        """The two arrays of some encoded names."""
        starts = np.zeros(len(names) + 1, np.int64)
        np.cumsum([len(name) for name in names], out=starts[1:])
        return np.frombuffer(b"".join(names), np.uint8), starts


def digest(source):
    """SHA-256 of a source's classes and of the label and name of every image: which one is where."""
    whole = hashlib.sha256(json.dumps(source.class_names).encode())
    for array in (source.labels, source.names.text, source.names.starts):
        whole.update(np.ascontiguousarray(array))
    return whole.hexdigest()


def make_index(labels, names, **arrays):
    """An Index of records in any order: the arrays labels, text and starts (see Names), and further ones.

    labels: n integers. names: n strings, unique. arrays: of one entry a record.
    """
    labels = np.asarray(labels, np.int32)
    encoded = np.array([os.fsencode(name) for name in names], np.bytes_)
    order = np.lexsort((encoded, labels))  # bytes of UTF-8 sort as their characters
    text, starts = Names.pack(encoded[order].tolist())
    sorted_arrays = {name: array[order] for name, array in arrays.items()}
    return Index({"labels": labels[order], "text": text, "starts": starts, **sorted_arrays})


def cached_index(directory, name, fingerprint, build, keep=lambda index: True):
    """The index of this name and fingerprint: from its file, or built and kept.

    Args:
      directory: of the data; the file is put there, or into the user's cache folder.
      name: of the index, unique within the directory.
      fingerprint: changes whenever the index has to be made anew.
      build: function without arguments that makes the Index.
      keep: tells whether an Index is worth a file.

    Returns:
      The Index, mapped from its file; in memory if it could be written nowhere.
    """
    digest = hashlib.sha256(str(Path(directory).resolve()).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    places = [
        Path(directory) / f".convit_jax-{name}.index",
        cache / "convit_jax/indices" / f"{digest}-{name}.index",
    ]
    for path in places:
        # There is none, or it is cut off, or of other data.
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
            return _read(path, fingerprint)
    index = build()
    for path in places if keep(index) else ():
        with contextlib.suppress(OSError):  # read-only or full: the next place
            _write(path, fingerprint, index.arrays)
            return _read(path, fingerprint)
    return index


def _write(path, fingerprint, arrays):
    """A line of JSON, then the bytes of each array at a multiple of 64; complete or not at all."""
    entries = {name: {"dtype": array.dtype.str, "shape": array.shape} for name, array in arrays.items()}
    header = json.dumps({"magic": MAGIC, "fingerprint": fingerprint, "arrays": entries}).encode() + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, unfinished = tempfile.mkstemp(prefix=path.name, suffix=".unfinished", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(header)
            for array in arrays.values():
                file.write(bytes(-file.tell() % 64))
                file.write(array.tobytes())
            file.flush()
            os.fsync(file.fileno())
        os.chmod(unfinished, 0o644)  # whoever may read the data may read its index
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise


def _read(path, fingerprint):
    """The Index in a file; ValueError if the file is not a complete one of that fingerprint."""
    with open(path, "rb") as file:
        header = json.loads(file.readline(1 << 16))
        position, size = file.tell(), os.fstat(file.fileno()).st_size
    if header["magic"] != MAGIC or header["fingerprint"] != fingerprint:
        raise ValueError(f"{path} is not the index of {fingerprint}")
    arrays = {}
    for name, entry in header["arrays"].items():
        position += -position % 64
        dtype, shape = np.dtype(entry["dtype"]), tuple(entry["shape"])
        length = dtype.itemsize * int(np.prod(shape))
        if position + length > size:
            raise ValueError(f"{path} is cut off")
        # np.memmap cannot map nothing; as a plain array, since the class costs time at every access.
        arrays[name] = (
            np.asarray(np.memmap(path, dtype, "r", position, shape)) if length else np.zeros(shape, dtype)
        )
        position += length
    return Index(arrays, path, fingerprint)
