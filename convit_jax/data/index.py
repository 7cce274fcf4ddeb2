"""Sources of images, and their index: a label, a name and the place of each image, kept on disk between runs.

Listing takes a pass over the data, so the arrays are kept next to the data or, where that is read-only, in
the user's cache folder. They are memory-mapped: loader workers share them. Its name tells the data that an index
is of, so that changed data take nothing from a run that still reads the old one.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = "convit_jax index 3"
UNUSABLE = (OSError, ValueError, LookupError, TypeError, EOFError)  # what damaged files raise

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Index:
    """Arrays with one entry per image, in the order (label, name). It pickles as its path if it has one."""

    arrays: Arrays  # "labels" int32 [n], "names" in UTF-8, bytes [n], and the place of each image
    path: Path | None = None  # directory that the arrays are mapped from
    fingerprint: str = ""  # of the data

    def __reduce__(self) -> tuple:
        return (Index, (self.arrays,)) if self.path is None else (_read, (self.path, self.fingerprint))


class Source:
    """Labelled images by number, in the order (label, name). It is pickled for the workers of the loader."""

    class_names: tuple[str, ...]
    index: Index
    note = ""  # for people: what was found and not used

    @property
    def labels(self) -> np.ndarray:
        """Class of each image, int32 [n]."""
        return self.index.arrays["labels"]

    def name(self, number: int) -> str:
        """Returns the name of an image, CLASS/FILE, unique."""
        return os.fsdecode(self.index.arrays["names"][number])

    def __getitem__(self, number: int) -> bytes | np.ndarray:
        """Returns the content of an image file, or pixels as uint8 [H, W, 3]."""
        raise NotImplementedError


def make_index(labels: Sequence[int], names: Sequence[str], **places: np.ndarray) -> Index:
    """Returns the Index of images in any order; names are unique, `places` have one entry per image."""
    arrays = {"labels": np.array(labels, np.int32), "names": np.array([os.fsencode(name) for name in names], np.bytes_)}
    order = np.lexsort((arrays["names"], arrays["labels"]))  # bytes of UTF-8 sort as their characters
    return Index({name: array[order] for name, array in (arrays | places).items()})


def cached_index(
    directory: Path,
    name: str,
    facts: Any,
    build: Callable[[], Index],
    keep: Callable[[Arrays], bool] = lambda arrays: True,
) -> Index:
    """Returns an index, built only if it was not kept: mapped from disk, or in memory if it cannot be kept.

    Other facts (about the data, for JSON) have another index. `keep` tells whether arrays are worth keeping.
    """
    fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    key = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:16]
    places = [directory / f".convit_jax-{name}-{fingerprint}"]
    with contextlib.suppress(RuntimeError):  # the user has no home directory
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        places.append(cache / f"convit_jax/indices/{key}-{name}-{fingerprint}")
    for path in places:
        try:
            return _read(path, fingerprint)
        except UNUSABLE as error:
            if isinstance(error, FileNotFoundError) or not isinstance(error, OSError):  # missing or damaged
                shutil.rmtree(path, ignore_errors=True)
    index = build()
    for path in places if keep(index.arrays) else ():
        with contextlib.suppress(*UNUSABLE):  # read-only or full
            _write(path, fingerprint, index.arrays)
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
        Path(unfinished, "index.json").write_text(json.dumps(facts))
        os.chmod(unfinished, 0o755)  # whoever can read the data can read its index
        with contextlib.suppress(OSError):  # another process was faster
            os.rename(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # only there if the rename did not happen


def _read(path: Path, fingerprint: str) -> Index:
    """Maps the arrays of a directory; raises if it is damaged or has another fingerprint."""
    facts = json.loads((path / "index.json").read_text())
    if facts["format"] != FORMAT or facts["fingerprint"] != fingerprint:
        raise ValueError(f"{path} is not the index of {fingerprint}")
    mapped = {name: np.load(path / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in facts["arrays"]}
    return Index({name: np.asarray(array) for name, array in mapped.items()}, path, fingerprint)  # memmaps are slower
