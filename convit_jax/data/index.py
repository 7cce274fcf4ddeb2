"""Sources of images, and their index: a label, a name and the place of each image, kept on disk between runs.

Listing takes a pass over the data, so the index is kept next to the data or, where that is read-only, in
the user's cache folder. It is memory-mapped: loader workers share it. The file name contains a hash of the data, so
changed data get a new index, and running jobs keep theirs.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convit_jax.rundir import atomic_write

FORMAT = 4  # of the tables; another one has other file names


@dataclass(frozen=True, eq=False)
class Index:
    """A table with one row per image, in the order (label, name). It pickles as its path if it has one."""

    table: np.ndarray  # fields "labels" int32, "names" in UTF-8, bytes, and the place of each image; [n]
    path: Path | None = None  # file that the table is mapped from

    def __reduce__(self) -> tuple:
        return (Index, (self.table,)) if self.path is None else (_read, (self.path,))


class Source:
    """Labelled images by number, in the order (label, name). It is pickled for the workers of the loader."""

    class_names: tuple[str, ...]
    index: Index
    note = ""  # for people: what was found and not used

    @property
    def labels(self) -> np.ndarray:
        """Class of each image, int32 [n]."""
        return self.index.table["labels"]

    def name(self, number: int) -> str:
        """Returns the name of an image, CLASS/FILE, unique."""
        return os.fsdecode(self.index.table["names"][number])

    def __getitem__(self, number: int) -> bytes | np.ndarray:
        """Returns the content of an image file, or pixels as uint8 [H, W, 3]."""
        raise NotImplementedError


def make_index(labels: Sequence[int], names: Sequence[str], **places: np.ndarray) -> Index:
    """Returns the Index of images in any order; names are unique, `places` have one entry per image."""
    encoded = np.array([os.fsencode(name) for name in names], np.bytes_)
    columns = {"labels": np.array(labels, np.int32), "names": encoded, **places}
    table = np.empty(len(encoded), [(field, column.dtype) for field, column in columns.items()])
    for field, column in columns.items():
        table[field] = column
    return Index(table[np.lexsort((encoded, table["labels"]))])  # bytes of UTF-8 sort as their characters


def cached_index(
    directory: Path,
    name: str,
    facts: Any,
    build: Callable[[], Index],
    keep: Callable[[np.ndarray], bool] = lambda table: True,
) -> Index:
    """Returns an index, built only if it was not kept: mapped from disk, or in memory if it cannot be kept.

    Other facts (about the data, for JSON) have another index. `keep` tells whether a table is worth keeping.
    """
    fingerprint = hashlib.sha256(json.dumps([FORMAT, facts]).encode()).hexdigest()[:16]
    key = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:16]
    places = [directory / f".convit_jax-{name}-{fingerprint}.npy"]
    with contextlib.suppress(RuntimeError):  # the user has no home directory
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        places.append(cache / f"convit_jax/indices/{key}-{name}-{fingerprint}.npy")
    for path in places:
        try:
            return _read(path)
        except OSError:  # missing, or not to be read now
            pass
        except Exception:  # damaged: NumPy raises all kinds
            with contextlib.suppress(OSError):
                path.unlink()
    index = build()
    for path in places if keep(index.table) else ():
        with contextlib.suppress(OSError):  # read-only or full
            if not path.exists():  # another run may have been faster, and has mapped it
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(path, "wb") as file:
                    np.save(file, index.table)
            return _read(path)
    return index


def _read(path: Path) -> Index:
    """Maps the table in a file. Raises OSError if it cannot be read, any other exception if it is damaged."""
    table = np.asarray(np.load(path, mmap_mode="r"))  # memmaps are slower
    if not {"labels", "names"} <= {*(table.dtype.names or ())}:
        raise ValueError(f"{path} is not an index")
    return Index(table, path)
