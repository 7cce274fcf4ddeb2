"""Mutated checkpoints end in arrays or in a message, within ten seconds and 256 MB, and import nothing.

A few hundred of them in the test, thousands by hand: python tests/weights/test_fuzz.py 2000 SEED. A file
that does otherwise is kept and named.
"""

import io
import itertools
import pickletools
import random
import resource
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
from forgery import save_torch, torch_zip  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402

from convit_jax.errors import UserError  # noqa: E402
from convit_jax.weights.checkpoint_file import read_state_dict  # noqa: E402

SECONDS, BYTES = 10, 2**28
INTERESTING = (0, 1, 0x7F, 0x80, 0xFF, *(ord(code.code) for code in pickletools.opcodes))
NUMBERS = (0, 1, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)


def valid_files():
    """The contents of small valid files of each format."""
    small = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float16)}
    save_torch(Path("small.pth"), small)
    save_file(small, "small.safetensors")
    golden = [ROOT / "tests/golden" / f"kinds_{kind}.pth" for kind in ("zip", "zip_protocol_5", "stream")]
    return [Path(file).read_bytes() for file in ("small.pth", "small.safetensors", *golden)]


def mutate(data, files, rng):
    """The bytes of a file after a few changes; of most zip files only the pickle, with correct checksums."""
    if not data.startswith(b"PK") or rng.random() < 0.2:
        return mutate_bytes(data, files, rng)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    program = members.pop("data.pkl")
    program = mutate_bytes(program, files, rng) if rng.random() < 0.5 else mutate_program(program, rng)
    return torch_zip(program, **members)


def mutate_bytes(data, files, rng):
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
    return bytes(data)


def mutate_program(program, rng):
    """A pickle in which a few instructions were repeated, dropped or exchanged."""
    starts = [position for _, _, position in pickletools.genops(program)]
    parts = [program[a:b] for a, b in itertools.pairwise([*starts, len(program)])]
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, length = rng.randrange(len(parts) - 1), rng.choice((0, 1, 1, 3, 12))
        other = rng.randrange(len(parts))
        if rng.random() < 0.5:  # the same instruction with other arguments
            other = rng.choice([i for i, part in enumerate(parts) if part[:1] == parts[at][:1]])
        if rng.random() < 0.25 and len(parts) > length + 2:
            del parts[at : at + length]
        else:
            parts[at : at + rng.choice((0, length))] = parts[other : other + max(length, 1)]
    return b"".join(parts)


def main(count, seed):
    """Reads mutated files in the working directory."""
    path, files, refused, modules = Path("mutated"), valid_files(), 0, {*sys.modules}
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES,) * 2)
    for number in range(count):
        rng = random.Random(f"{seed} {number}")
        path.write_bytes(mutate(rng.choice(files), files, rng))
        signal.alarm(SECONDS)
        try:
            for array in read_state_dict(path).values():
                array.tobytes()
        except UserError as error:
            refused += 1
            if "not enough memory" in str(error) or not str(error).isprintable():
                sys.exit(f"file {number} of seed {seed} (kept): {error!r}")
        except BaseException as error:
            sys.exit(f"file {number} of seed {seed} (kept) ends in {type(error).__name__}: {error}")
        finally:
            signal.alarm(0)
    for left in (path, Path("small.pth"), Path("small.safetensors")):
        left.unlink()
    imported = [name for name in {*sys.modules} - modules if not name.startswith("encodings.")]
    print(f"{count} files: {count - refused} read, {refused} refused, {len(imported)} modules imported")


def test_mutated_files_give_values_or_a_message(tmp_path):
    command = [sys.executable, __file__, "300", "0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("refused, 0 modules imported\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
