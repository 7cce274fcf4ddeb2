"""The list of a data set's records: a label, a name and the place of each, kept on disk between runs.

Listing takes a pass over the data, so the arrays are kept next to the data or, where that is read-only, in
the user's cache folder. They are memory-mapped: loader workers share them.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = "convit_jax index 2"
FACTS = "index.json"

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Names:
    """A sequence of strings in two arrays, which take less memory than a list and can be mapped."""

    text: np.ndarray  # all strings in UTF-8, uint8 [bytes]
    starts: np.ndarray  # where each string starts, and the end, int64 [n + 1]

    @staticmethod
    def pack(names: Sequence[bytes]) -> "Names":
        """Returns the Names of encoded strings."""
        starts = np.cumsum([0, *map(len, names)], dtype=np.int64)
        return Names(np.frombuffer(b"".join(names), np.uint8), starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: int) -> str:
        number = range(len(self))[number]
        return os.fsdecode(self.text[self.starts[number] : self.starts[number + 1]].tobytes())

    def __iter__(self) -> Iterator[str]:
        return map(self.__getitem__, range(len(self)))


@dataclass(frozen=True, eq=False)
class Index:
    """Arrays with one entry per record, in the order (label, name). It pickles as its path if it has one."""

    arrays: Arrays  # "labels" int32 [n], "text" and "starts" of the Names, and the place of each record
    path: Path | None = None  # directory that the arrays are mapped from
    fingerprint: str = ""  # of the data

    def __reduce__(self) -> tuple:
        return (Index, (self.arrays,)) if self.path is None else (_read, (self.path, self.fingerprint))


class Indexed:
    """A source whose labels and names are those of `self.index`."""

    index: Index

    @property
    def labels(self) -> np.ndarray:
        return self.index.arrays["labels"]

    @property
    def names(self) -> Names:
        return Names(self.index.arrays["text"], self.index.arrays["starts"])

    def __len__(self) -> int:
        return len(self.labels)


def make_index(labels: Sequence[int], names: Sequence[str], **places: np.ndarray) -> Index:
    """Returns the Index of records in any order; names are unique, `places` have one entry per record."""
    encoded = np.array([os.fsencode(name) for name in names], np.bytes_)
    order = np.lexsort((encoded, np.asarray(labels)))  # bytes of UTF-8 sort as their characters
    packed = Names.pack(encoded[order].tolist())
    arrays = {"labels": np.asarray(labels, np.int32)[order], "text": packed.text, "starts": packed.starts}
    return Index(arrays | {name: array[order] for name, array in places.items()})


def cached_index(
    directory: Path,
    name: str,
    facts: Any,
    build: Callable[[], Index],
    keep: Callable[[Arrays], bool] = lambda arrays: True,
) -> Index:
    """Returns an index, built only if it was not kept: mapped from disk, or in memory if it cannot be kept.

    Args:
      directory: of the data. The index goes there or into the user's cache folder.
      name: of the index, unique within the directory.
      facts: about the data, for JSON. An index of other facts is replaced.
      build: makes the index.
      keep: whether an index with these arrays is worth keeping.
    """
    fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    key = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    places = [directory / f".convit_jax-{name}-index", cache / f"convit_jax/indices/{key}-{name}"]
    unusable = (OSError, ValueError, LookupError, TypeError, EOFError)  # what damaged files raise
    for path in places:
        with contextlib.suppress(*unusable):
            return _read(path, fingerprint)
        shutil.rmtree(path, ignore_errors=True)  # damaged, or of other data
    index = build()
    for path in places if keep(index.arrays) else ():
        with contextlib.suppress(OSError):  # read-only, full, or another process was faster
            _write(path, fingerprint, index.arrays)
        with contextlib.suppress(*unusable):
            return _read(path, fingerprint)
    return index


def _write(path: Path, fingerprint: str, arrays: Arrays) -> None:
    """Writes a directory with one .npy file per array; it appears under its name when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = tempfile.mkdtemp(prefix=path.name, suffix=".unfinished", dir=path.parent)
    try:
        for name, array in arrays.items():
            with open(f"{unfinished}/{name}.npy", "wb") as file:
                np.save(file, array)
                file.flush()
                os.fsync(file.fileno())
        facts = {"format": FORMAT, "fingerprint": fingerprint, "arrays": list(arrays)}
        Path(unfinished, FACTS).write_text(json.dumps(facts))
        os.chmod(unfinished, 0o755)  # whoever can read the data can read its index
        os.rename(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # only there if the rename did not happen


def _read(path: Path, fingerprint: str) -> Index:
    """Maps the arrays of a directory; raises if it is damaged or has another fingerprint."""
    facts = json.loads((path / FACTS).read_text())
    if facts["format"] != FORMAT or facts["fingerprint"] != fingerprint:
        raise ValueError(f"{path} is not the index of {fingerprint}")
    files = {name: np.load(path / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in facts["arrays"]}
    return Index({name: np.asarray(array) for name, array in files.items()}, path, fingerprint)  # memmaps are slower
