"""The list of a data set's records: a label, a name and the place of each, kept on disk between runs.

Listing takes a pass over the data, so the arrays are kept next to the data or, where that is read-only, in
the user's cache folder. They are memory-mapped: loader workers share them.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

FORMAT = "convit_jax index 2"
FACTS = "index.json"


@dataclasses.dataclass(frozen=True, eq=False)
class Names:
    """A sequence of strings in two arrays, which take less memory than a list and can be mapped.

    Attributes:
      text: all strings in UTF-8, uint8 [bytes].
      starts: where each string starts in `text`, and the end, int64 [n + 1].
    """

    text: np.ndarray
    starts: np.ndarray

    @staticmethod
    def pack(names: Sequence[bytes]) -> "Names":
        """Returns the Names of encoded strings."""
        starts = np.zeros(len(names) + 1, np.int64)
        np.cumsum([len(name) for name in names], out=starts[1:])
        return Names(np.frombuffer(b"".join(names), np.uint8), starts)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, number: int) -> str:
        number = range(len(self))[number]
        return os.fsdecode(self.text[self.starts[number] : self.starts[number + 1]].tobytes())

    def __iter__(self) -> Iterator[str]:
        return map(self.__getitem__, range(len(self)))


@dataclasses.dataclass(frozen=True, eq=False)
class Index:
    """Arrays with one entry per record, in the order (label, name).

    Attributes:
      arrays: "labels" int32 [n], "text" and "starts" (see Names), and the place of each record.
      path: the directory that the arrays are mapped from; None: they are in memory.
      fingerprint: of the data.
    """

    arrays: dict[str, np.ndarray]
    path: Path | None = None
    fingerprint: str = ""

    def __reduce__(self) -> tuple:
        if self.path is None:
            return Index, (self.arrays,)
        return _read, (self.path, self.fingerprint)


class Indexed:
    """A source whose labels and names are those of `self.index`."""

    index: Index

    @property
    def labels(self) -> np.ndarray:
        """Class of each image, int32 [n]."""
        return self.index.arrays["labels"]

    @property
    def names(self) -> Names:
        """Name of each image, CLASS/FILE."""
        return Names(self.index.arrays["text"], self.index.arrays["starts"])

    def __len__(self) -> int:
        return len(self.labels)


def make_index(labels: Sequence[int], names: Sequence[str], **arrays: np.ndarray) -> Index:
    """Returns the Index of records that are given in any order.

    Args:
      labels: class of each record.
      names: name of each record, unique.
      **arrays: further arrays with one entry per record.
    """
    encoded = np.array([os.fsencode(name) for name in names], np.bytes_)
    order = np.lexsort((encoded, np.asarray(labels)))  # bytes of UTF-8 sort as their characters
    packed = Names.pack(encoded[order].tolist())
    return Index(
        {
            "labels": np.asarray(labels, np.int32)[order],
            "text": packed.text,
            "starts": packed.starts,
            **{name: array[order] for name, array in arrays.items()},
        }
    )


def cached_index(
    directory: Path,
    name: str,
    fingerprint: str,
    build: Callable[[], Index],
    keep: Callable[[dict[str, np.ndarray]], bool] = lambda arrays: True,
) -> Index:
    """Returns the index with this name and fingerprint, built only if it was not kept.

    Args:
      directory: of the data. The index goes there or into the user's cache folder.
      name: of the index, unique within the directory.
      fingerprint: of the data. An index with another one is replaced.
      build: makes the index.
      keep: whether an index with these arrays is worth keeping.

    Returns:
      The Index, mapped from disk, or in memory if it could not be kept.
    """
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


def _write(path: Path, fingerprint: str, arrays: dict[str, np.ndarray]) -> None:
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
    # As plain arrays: every access to a np.memmap is slower.
    arrays = {
        name: np.asarray(np.load(path / f"{name}.npy", mmap_mode="r", allow_pickle=False)) for name in facts["arrays"]
    }
    return Index(arrays, path, fingerprint)
