"""The same training again, and on eight simulated devices: how far curves and weights lie apart.

    python -m benchmarks.reproducibility [--devices=8] [--config=FILE --config.epochs=20 ...]

Each is a train.py of its own, with these flags. "again" repeats the first on whatever devices there are; the
others run on a CPU that shows itself as so many devices, without and with the parameters cut over them
(mesh.fsdp), and are compared with one on a CPU of one device. Curves are all of metrics.jsonl but speeds.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

from convit_jax.cli import ROOT
from convit_jax.rundir import read_metrics
from convit_jax.training.metrics import SPEEDS
from convit_jax.weights.run import read_run


def train(arguments, workdir, simulated=None):
    """Run train.py; simulated: on a CPU that shows itself as so many devices."""
    environment = dict(os.environ)
    if simulated:
        flags = f"{environment.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={simulated}"
        environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    print(f"{workdir.name} ...", flush=True)
    command = [sys.executable, "train.py", f"--workdir={workdir}", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}")
    return workdir


def curves(workdir):
    """{name: float64 array of all its values, in order} of a run's log."""
    found = {}
    for line in read_metrics(workdir / "metrics.jsonl"):
        for name, value in line.items():
            if name not in SPEEDS:
                found.setdefault(name, []).append(np.ravel(value))
    return {name: np.concatenate(values).astype(np.float64) for name, values in found.items()}


def differences(one, other):
    """{curve or "weights": largest difference} of two runs with the same steps."""
    ours, theirs = curves(one), curves(other)
    apart = {name: float(np.max(np.abs(ours[name] - theirs[name]))) for name in ours}
    weights = zip(*(jax.tree.leaves(read_run(run, "latest")) for run in (one, other)), strict=True)
    return apart | {"weights": max(float(np.max(np.abs(a - b))) for a, b in weights)}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, default=8)
    options, arguments = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        folder, many = Path(folder), options.devices
        once, again = (train(arguments, folder / name) for name in ("once", "again"))
        one = once if jax.default_backend() == "cpu" else train(arguments, folder / "one device", 1)
        pairs = {
            "again": (once, again),
            f"{many} devices": (one, train(arguments, folder / f"{many} devices", many)),
            f"{many} devices, fsdp {many}": (
                one,
                train([*arguments, f"--config.mesh.fsdp={many}"], folder / "fsdp", many),
            ),
        }
        found = {name: differences(*pair) for name, pair in pairs.items()}
    print(f"\nlargest difference | {' | '.join(found)}")
    for curve in found["again"]:
        print(f"{curve} | {' | '.join(f'{apart[curve]:.2g}' for apart in found.values())}")


if __name__ == "__main__":
    main()
