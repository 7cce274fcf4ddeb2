"""Converting a checkpoint: time and memory next to PyTorch's, in processes of their own, in turn.

    python -m benchmarks.convert --checkpoint=convit_base.pth --peer=PYTHON [--model=NAME] [--repeats=5]

PYTHON is an interpreter that has torch and timm; the checkpoint is a state dict of timm's MODEL. A
process imports what it needs, notes its memory, does its job once and reports the seconds, those
of the processor (all threads, for when others use the machine too), and by how much its memory
had grown at the highest (VmHWM of Linux). The table gives medians.
"""

import argparse
import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def to_params(checkpoint, model):
    """Ours: the parameters in memory of JAX; the network, shapes without memory, is there before."""
    import jax

    from convit_jax.models.variants import abstract_model, model_settings
    from convit_jax.weights import names, reader

    _, shapes = abstract_model(model_settings(model))
    jax.devices()  # JAX is started
    return lambda: jax.block_until_ready(
        jax.device_put(names.to_params(reader.open_state_dict(checkpoint), shapes))
    )


def load_pretrained(checkpoint, model):
    """Ours: the whole, architecture inferred, everything checked, the model made."""
    import jax
    from flax import nnx

    from convit_jax import load_pretrained

    jax.devices()
    return lambda: jax.block_until_ready(nnx.state(load_pretrained(checkpoint)))


def convert(checkpoint, model):
    """Ours: python -m convit_jax.convert SOURCE TARGET, a directory that is on the disk when it returns."""
    from convit_jax.weights.formats import save
    from convit_jax.weights.pretrained import load

    def job():
        with tempfile.TemporaryDirectory() as folder:
            save(load(checkpoint), Path(folder) / "weights")

    return job


def torch_load_state_dict(checkpoint, model):
    """PyTorch: the state dict, copied into a network of timm; making that counts as memory, not as time."""
    import timm
    import torch

    network = timm.create_model(model)
    return lambda: network.load_state_dict(torch.load(checkpoint, weights_only=True))


def timm_create_and_load(checkpoint, model):
    """PyTorch: the same, and making the network counts as time."""
    import timm
    import torch

    return lambda: timm.create_model(model).load_state_dict(torch.load(checkpoint, weights_only=True))


def torch_save_file(checkpoint, model, *, synced=False):
    """PyTorch: read, and write as safetensors; waits for the disk only if `synced`."""
    import torch
    from safetensors.torch import save_file

    def job():
        with tempfile.TemporaryDirectory() as folder:
            save_file(torch.load(checkpoint, weights_only=True), Path(folder) / "weights.safetensors")
            if synced:
                with open(Path(folder) / "weights.safetensors", "rb") as file:
                    os.fsync(file.fileno())

    return job


OURS, PEERS = ["jax", "convit_jax.weights.pretrained"], ["torch", "timm"]
JOBS = {  # name: (function, whether it needs the other interpreter, modules whose memory does not count)
    "open_state_dict + to_params": (to_params, False, OURS),
    "torch.load + load_state_dict": (torch_load_state_dict, True, PEERS),
    "load_pretrained": (load_pretrained, False, OURS),
    "create_model + load + load_state_dict": (timm_create_and_load, True, PEERS),
    "convert SOURCE DIRECTORY": (convert, False, OURS),
    "torch.load + save_file .safetensors": (torch_save_file, True, ["torch", "safetensors.torch"]),
    "torch.load + save_file, fsync": (
        functools.partial(torch_save_file, synced=True),
        True,
        ["torch", "safetensors.torch"],
    ),
}


def megabytes(field):
    """VmRSS or VmHWM of this process, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError(f"no {field} in /proc/self/status: this benchmark needs Linux.")


def measure(name, checkpoint, model):
    """Do a job once in this process; prints {"seconds": ..., "processor": ..., "megabytes": ...}."""
    function, _, modules = JOBS[name]
    with contextlib.suppress(ImportError):  # beside a build of PyTorch that misses torchvision's operators
        if "timm" in modules:
            import timm_here  # noqa: F401
    for module in modules:
        __import__(module)
    before = megabytes("VmRSS")
    job = function(checkpoint, model)
    start, start_processor = time.perf_counter(), time.process_time()
    result = job()
    seconds, processor = time.perf_counter() - start, time.process_time() - start_processor
    grown = megabytes("VmHWM") - before
    print(json.dumps({"seconds": seconds, "processor": processor, "megabytes": grown}))
    del result


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--peer")
    parser.add_argument("--model", default="convit_base")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        return measure(arguments.job, arguments.checkpoint, arguments.model)
    size = os.path.getsize(arguments.checkpoint) / 1e6
    results = {name: [] for name, (_, is_peer, _) in JOBS.items() if arguments.peer or not is_peer}
    for _ in range(arguments.repeats):
        for name in results:
            python = arguments.peer if JOBS[name][1] else sys.executable
            command = [python, __file__, f"--checkpoint={arguments.checkpoint}", f"--model={arguments.model}"]
            environment = {
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            }
            done = subprocess.run(
                [*command, f"--job={name}"], env=environment, capture_output=True, text=True, check=False
            )
            if done.returncode:
                sys.exit(f"{name} failed:\n{done.stderr}")
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{arguments.checkpoint}: {size:.0f} MB, {arguments.repeats} repeats, median (smallest to largest)")
    for name, runs in results.items():
        seconds = sorted(run["seconds"] for run in runs)
        processor = statistics.median(run["processor"] for run in runs)
        memory = statistics.median(run["megabytes"] for run in runs)
        print(
            f"{name:38} {statistics.median(seconds):7.3f} s ({seconds[0]:.3f} to {seconds[-1]:.3f})"
            f"  processor {processor:.3f} s"
            f"  {memory:6.0f} MB ({memory / size:.2f} x the file)"
        )


if __name__ == "__main__":
    main()
