"""Reads mutated checkpoints: python tests/weights/fuzz.py [--files=2000] [--seed=0]

Each file must end in arrays or in a UserError, within ten seconds and 256 MB. One that does not is kept
and named. Mutations change bytes (checksums of most zip files are corrected, so that the changed bytes
are read) or repeat, drop and exchange whole instructions of the pickle in a sound zip file.
"""

import argparse
import collections
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
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
from forgery import save_torch, torch_zip  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402

from convit_jax.errors import UserError  # noqa: E402
from convit_jax.weights.checkpoint_file import read_state_dict  # noqa: E402

SECONDS, BYTES = 10, 2**28
CODES = [ord(code.code) for code in pickletools.opcodes]
INTERESTING = (0, 1, 0x7F, 0x80, 0xFF, *CODES)
NUMBERS = (0, 1, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)


def valid_files(folder):
    """The contents of small valid files of each format."""
    small = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float16)}
    save_torch(folder / "small.pth", small)
    save_file(small, folder / "small.safetensors")
    golden = ("kinds_zip.pth", "kinds_zip_protocol_5.pth", "kinds_stream.pth", "big_endian.pth")
    files = [
        folder / "small.pth",
        folder / "small.safetensors",
        *(ROOT / "tests/golden" / name for name in golden),
    ]
    return [file.read_bytes() for file in files]


def mutate(data, files, rng):
    """The bytes of a file after one to six changes."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        at, length = rng.randrange(len(data) or 1), rng.choice((1, 4, 8, 50, 200))
        kind = rng.randrange(7)
        if kind == 0:
            data[at : at + 1] = bytes([rng.choice(INTERESTING)])
        elif kind == 1:
            del data[at : at + length]
        elif kind == 2:
            data[at:at] = bytes(rng.choice(INTERESTING) for _ in range(length % 10))
        elif kind == 3:
            width = rng.choice((2, 4, 8))
            data[at : at + width] = (rng.choice(NUMBERS) % 2 ** (8 * width)).to_bytes(width, "little")
        elif kind == 4:
            other = rng.choice(files)
            start = rng.randrange(len(other))
            data[at : at + rng.choice((0, length))] = other[start : start + length]
        elif kind == 5 and rng.random() < 0.3:
            del data[at:]
        elif digits := [i for i, byte in enumerate(data) if 0x30 <= byte <= 0x39]:
            data[rng.choice(digits)] = rng.choice(b"0123456789-,]")
    if rng.random() < 0.8:
        correct_checksums(data)
    return bytes(data)


def correct_checksums(data):
    """Makes the checksums in a zip directory fit the data, where the directory is still in one piece."""
    at = data.find(b"PK\1\2")
    while 0 <= at <= len(data) - 46:
        size, name_length = struct.unpack_from("<L4xH", data, at + 20)
        (header,) = struct.unpack_from("<L", data, at + 42)
        if header <= len(data) - 30:
            start = header + 30 + name_length + struct.unpack_from("<H", data, header + 28)[0]
            struct.pack_into("<L", data, at + 16, zlib.crc32(data[start : start + size]))
        at = data.find(b"PK\1\2", at + 4)


def mutate_program(path, rng):
    """A zip file in whose pickle a few instructions were repeated, dropped or exchanged."""
    with zipfile.ZipFile(path) as archive:
        members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    program = members.pop("data.pkl")
    starts = [position for _, _, position in pickletools.genops(program)]
    parts = [program[a:b] for a, b in itertools.pairwise([*starts, len(program)])]
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, other, length = (
            rng.randrange(len(parts) - 1),
            rng.randrange(len(parts)),
            rng.choice((1, 1, 3, 12)),
        )
        if rng.random() < 0.5:  # the same instruction with other arguments
            other = rng.choice([i for i, part in enumerate(parts) if part[:1] == parts[at][:1]])
        action = rng.randrange(4)
        if action == 0:
            parts[at:at] = parts[other : other + length]
        elif action == 1 and len(parts) > length + 2:
            del parts[at : at + length]
        elif action == 2:
            parts[at : at + length] = parts[other : other + length]
        else:
            parts[at], parts[other] = parts[other], parts[at]
    return torch_zip(b"".join(parts), **members)


def memory(field):
    """VmSize, VmRSS or VmHWM of this process in bytes."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    counts, slowest = collections.Counter(), 0.0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mutated"
        files = valid_files(Path(folder))
        modules, before = {*sys.modules}, memory("VmHWM")
        resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + BYTES,) * 2)
        for number in range(arguments.files):
            rng = random.Random(f"{arguments.seed} {number}")
            data = rng.choice(files)
            path.write_bytes(data)
            by_instruction = data.startswith(b"PK") and rng.random() < 0.4
            data = mutate_program(path, rng) if by_instruction else mutate(data, files, rng)
            path.write_bytes(data)
            signal.alarm(SECONDS)
            start = time.process_time()
            try:
                for array in read_state_dict(path).values():
                    array.tobytes()
                counts["read"] += 1
            except UserError as error:
                counts["refused" if str(error).isprintable() else "unprintable"] += 1
                counts["no memory"] += "not enough memory" in str(error)
            except BaseException as error:
                Path(f"fuzz_{arguments.seed}_{number}").write_bytes(data)
                sys.exit(f"file {number} of seed {arguments.seed} (kept) ends in {type(error).__name__}: {error}")
            finally:
                signal.alarm(0)
            slowest = max(slowest, time.process_time() - start)
        imported = [name for name in {*sys.modules} - modules if not name.startswith("encodings.")]
    print(
        f"{arguments.files} files: {counts['read']} read, {counts['refused']} refused with a message "
        f"({counts['no memory']} for lack of memory, {counts['unprintable']} unprintable), "
        f"{len(imported)} modules imported, the slowest took {slowest:.3f} s, "
        f"memory grew by {(memory('VmHWM') - before) / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    main()
