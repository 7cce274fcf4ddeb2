"""Reads mutated checkpoints: python tests/weights/fuzz.py [--files=2000] [--seed=0]

Every file must end in arrays or in a UserError, within ten seconds and 256 MB, and in the same
whether a state dict is read whole or row by row; one that does otherwise is kept and named. Most
mutations change bytes; the checksums of most zip files are mended, so that what was changed is
looked at. Others repeat, drop and exchange whole instructions of the pickle in a sound zip file,
which leads deeper into the reader.
"""

import argparse
import collections
import io
import itertools
import pickletools
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from convit_jax.errors import UserError  # noqa: E402
from convit_jax.weights import reader, writer  # noqa: E402
from convit_jax.weights.stored import Stored  # noqa: E402
from convit_jax.weights.unpickler import NAMES  # noqa: E402

SECONDS, BYTES = 10, 2**28
INTERESTING = (0, 1, 0x7F, 0x80, 0xFF, *NAMES)


def seeds(folder):
    """The contents of small valid files of each format."""
    names = ("kinds_zip.pth", "kinds_zip_protocol_5.pth", "kinds_stream.pth", "big_endian.pth")
    files = [(ROOT / "tests/golden" / name).read_bytes() for name in names]
    small = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.ones(2, bool),
        "c": np.zeros((), np.int64),
    }
    for name in ("small.safetensors", "small.pth"):
        writer.write(folder / name, small)
        files.append((folder / name).read_bytes())
    return files


def mutate(data, files, rng):
    """The bytes of a file after one to six changes."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        at = rng.randrange(len(data) or 1)
        kind = rng.randrange(9)
        if kind == 0:
            data[at : at + 1] = bytes([rng.choice(INTERESTING)])
        elif kind == 1 and data:
            data[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
        elif kind == 2:
            data[at : at + rng.choice((1, 2, 4, 8, 100))] = b""
        elif kind == 3:
            data[at:at] = bytes(rng.choice(INTERESTING) for _ in range(rng.choice((1, 2, 4, 8))))
        elif kind == 4:
            width = rng.choice("HIQ")
            value = rng.choice((0, 1, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)) % 2 ** (
                8 * struct.calcsize(width)
            )
            data[at : at + struct.calcsize(width)] = struct.pack(f"<{width}", value)
        elif kind == 5:
            start, length = rng.randrange(len(data) or 1), rng.choice((4, 30, 200))
            data[at:at] = data[start : start + length]
        elif kind == 6:
            other = rng.choice(files)
            start, length = rng.randrange(len(other)), rng.choice((8, 50, 500))
            data[at : at + length] = other[start : start + length]
        elif kind == 7:
            del data[at:]
        else:
            digits = [i for i, byte in enumerate(data) if 0x30 <= byte <= 0x39]
            if digits:
                data[rng.choice(digits)] = rng.choice(b"0123456789-,]")
    if rng.random() < 0.8:
        mend(data)
    return bytes(data)


def mutate_program(data, rng):
    """A zip file in whose pickle a few instructions were repeated, dropped or exchanged."""
    old, new = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    with zipfile.ZipFile(new, "w") as archive:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("/data.pkl"):
                starts = [position for _, _, position in pickletools.genops(content)]
                parts = [content[a:b] for a, b in itertools.pairwise([*starts, len(content)])]
                for _ in range(rng.choice((1, 1, 2, 5))):
                    at, other = rng.randrange(len(parts) - 1), rng.randrange(len(parts))
                    if rng.random() < 0.5:  # the same instruction with other arguments
                        other = rng.choice([i for i, part in enumerate(parts) if part[:1] == parts[at][:1]])
                    length = rng.choice((1, 1, 3, 12))
                    action = rng.randrange(4)
                    if action == 0:
                        parts[at:at] = parts[other : other + length]
                    elif action == 1:
                        del parts[at : at + length]
                    elif action == 2:
                        parts[at : at + length] = parts[other : other + length]
                    else:
                        parts[at], parts[other] = parts[other], parts[at]
                content = b"".join(parts)
            archive.writestr(name, content)
    return new.getvalue()


def mend(data):
    """Make the checksums in a zip directory, where it is still in one piece, fit the data."""
    at = data.find(b"PK\1\2")
    while 0 <= at <= len(data) - 46:
        size, name_length = (
            struct.unpack_from("<L", data, at + 20)[0],
            struct.unpack_from("<H", data, at + 28)[0],
        )
        header = struct.unpack_from("<L", data, at + 42)[0]
        if header <= len(data) - 30:
            start = header + 30 + name_length + struct.unpack_from("<H", data, header + 28)[0]
            struct.pack_into("<L", data, at + 16, zlib.crc32(data[start : start + size]))
        at = data.find(b"PK\1\2", at + 4)


def leaves(value):
    """The values in a tree of plain containers."""
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return [value]
    return [leaf for item in value for leaf in leaves(item)]


def check(value):
    """Touch every number of what was read."""
    for leaf in leaves(value):
        if isinstance(leaf, np.ndarray):
            leaf.tobytes()
        else:
            assert isinstance(
                leaf, (str, bytes, int, float, complex, set, frozenset, np.generic, np.dtype, type(None))
            )


def at_once(path):
    """The state dict as `read` would give it."""
    with reader.opened(path) as (_, tree, plain):
        return reader.without_prefixes(plain.value(reader.find_state_dict(tree)))


def as_stored(path):
    """The state dict as it is converted, a few rows at a time."""
    arrays = {}
    for name, tensor in reader.open_state_dict(path).items():
        if isinstance(tensor, Stored):
            tensor = np.concatenate([rows.copy() for _, rows in tensor.rows()])
        arrays[name] = tensor
    return arrays


def result(way, path):
    """What a way of reading gives, or None if it refuses."""
    try:
        return way(path)
    except UserError:
        return None


def compare(one, other):
    """Both ways refuse, or both give the same."""
    assert (one is None) == (other is None), "one way refuses what the other one reads"
    if one is not None:
        assert list(one) == list(other), "the names differ"
        for name, array in one.items():
            np.testing.assert_array_equal(array, other[name], strict=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    counts, slowest = collections.Counter(), 0.0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mutated"
        files = seeds(Path(folder))
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
        for number in range(arguments.files):
            rng = random.Random(f"{arguments.seed} {number}")
            data = rng.choice(files)
            by_instruction = data.startswith(b"PK") and rng.random() < 0.4
            data = mutate_program(data, rng) if by_instruction else mutate(data, files, rng)
            path.write_bytes(data)
            signal.alarm(SECONDS)
            start = time.perf_counter()
            try:
                compare(result(at_once, path), result(as_stored, path))
                check(reader.read(path))
                counts["read"] += 1
            except UserError as error:
                counts["refused" if str(error).isprintable() else "unprintable"] += 1
                counts["no memory"] += "not enough memory" in str(error)
            except BaseException as error:
                Path(f"fuzz_{arguments.seed}_{number}").write_bytes(data)
                sys.exit(
                    f"file {number} of seed {arguments.seed} (kept) ends in {type(error).__name__}: {error}"
                )
            finally:
                signal.alarm(0)
            slowest = max(slowest, time.perf_counter() - start)
    print(
        f"{arguments.files} files: {counts['read']} read, {counts['refused']} refused with a sentence "
        f"({counts['no memory']} for want of memory, {counts['unprintable']} unprintable), "
        f"the slowest took {slowest:.3f} s"
    )


if __name__ == "__main__":
    main()
