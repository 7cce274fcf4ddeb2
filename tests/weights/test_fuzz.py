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
INTERESTING = [bytes([ord(code.code)]) for code in pickletools.opcodes]
INTERESTING += [
    number.to_bytes(width, "little")
    for width in (1, 2, 4, 8)
    for number in (0, 1, 2 ** (8 * width - 1) - 1, 2 ** (8 * width - 1), 2 ** (8 * width) - 1)
]


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
        return b"".join(splice(single(data), files, rng))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    program = members.pop("data.pkl")
    starts = [position for _, _, position in pickletools.genops(program)]
    instructions = [program[a:b] for a, b in itertools.pairwise([*starts, len(program)])]
    parts = rng.choice((single(program), instructions))
    return torch_zip(b"".join(splice(parts, files, rng)), **members)


def single(data):
    return [data[at : at + 1] for at in range(len(data))]


def splice(parts, files, rng):
    """Bytes or instructions of which a few stretches were dropped, repeated or replaced."""
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        source = rng.choice((parts, parts, single(rng.choice(files)), [rng.choice(INTERESTING)], []))
        at, start = rng.randrange(len(parts) or 1), rng.randrange(len(source) or 1)
        dropped, taken = (rng.choice((0, 1, 1, 1, 4, 50)) for _ in range(2))
        alike = [place for place, part in enumerate(source) if parts and part[:1] == parts[at][:1]]
        if alike and rng.random() < 0.5:  # the same instruction with other arguments
            start = rng.choice(alike)
        end = len(parts) if rng.random() < 0.05 else at + dropped
        parts = parts[:at] + source[start : start + taken] + parts[end:]
    return parts


def main(count, seed):
    """Reads mutated files in the working directory."""
    path, files, refused, modules = Path("mutated"), valid_files(), 0, {*sys.modules}
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES,) * 2)
    for number in range(count):
        rng = random.Random(seed << 32 | number)
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
