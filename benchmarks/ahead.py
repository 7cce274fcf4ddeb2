"""What XLA compiles for a GPU that is not there, and an estimate of the least time that it can take.

    pip install "jax[cuda13]"        # or cuda12; no GPU, no driver
    python -m benchmarks.ahead --model=convit_small@224 --batch=512 --programs="convit,plain,convit: cuDNN"
    python -m benchmarks.ahead --model=convit_small@224 --batch=4096 --mesh=1x8

XLA's own compiler makes the program for the device that DEVICES describes. For each kernel of its text counts
the longer of two times: to move its bytes to and from memory, and to multiply, at rates that were measured on
such a device. The sum is no measurement: real kernels are slower, but for what stays in the cache. What XLA
chooses by trying (cuBLAS or its own matrix products) is its default here. Memory is by XLA's account. With
--mesh=DATAxFSDP it is the recipe's step on so many devices, augmentation included, without the time on the
links between them; the batch is global.
"""

import argparse
import collections
import json
import os
import re
import time
from pathlib import Path
from unittest import mock

os.environ["JAX_PLATFORMS"] = "cpu"  # else JAX wants the GPU itself

import jax
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding

from benchmarks.hlo import COLLECTIVE, kernels
from benchmarks.model import PEERS, WAYS, known
from benchmarks.model_jax import as_in, megabytes, training_step
from benchmarks.where import recipe_step
from convit_jax.models import fused
from convit_jax.models.variants import abstract_model, count_macs, model_settings
from convit_jax.training.sharding import batch_sharding, gather, replicated, state_shardings
from convit_jax.training.step import new_state, train_metrics

# Name: description for XLA, bytes/s of a large copy, FLOP/s of a large bfloat16 product, both measured.
DEVICES = {
    "h200": (
        """
        gpu_device_info {
          threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
          shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
          registers_per_core_limit: 65536 registers_per_block_limit: 65536 core_count: 132 fpus_per_core: 128
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          memory_bandwidth: 4800000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98
          device_memory_size: 150754820096 cuda_compute_capability { major: 9 }
        }
        platform_name: "CUDA" device_description_str: "NVIDIA H200"
        dnn_version_info { major: 9 minor: 12 } runtime_version { major: 12 minor: 9 }
        """,
        4.3e12,
        790e12,
    )
}


def described_mesh(device, data, fsdp):
    """A mesh of so many devices that are not there."""
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=DEVICES[device][0], topology=f"1x1x{data * fsdp}"
        )
    except NotImplementedError:
        raise SystemExit('JAX has no compiler for NVIDIA GPUs here: pip install "jax[cuda13]"') from None
    grid = np.array(topology.devices).reshape(data, fsdp)
    return Mesh(grid, ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto))


def shaped(tree, shardings):
    """Shapes with shardings; one sharding stands for all."""
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )


def traced(settings, batch, task, mesh):
    """The step of benchmarks.model (task training or inference) for one device, traced."""
    graphdef, params = abstract_model(settings)
    here = replicated(mesh)
    images = shaped(jax.ShapeDtypeStruct((batch, *settings["image_size"], 3), np.float32), here)
    if task == "inference":
        forward = jax.jit(lambda params, images: nnx.merge(graphdef, params)(images))
        return forward.trace(shaped(params, here), images)
    step, optimizer = training_step(graphdef)
    state = (params, jax.eval_shape(optimizer.init, params))
    targets = jax.ShapeDtypeStruct((batch, settings["num_classes"]), np.float32)
    return jax.jit(step, donate_argnums=0).trace(shaped(state, here), images, shaped(targets, here))


def traced_recipe(settings, batch, mesh):
    """The recipe's training step, batch and state over a mesh, traced."""
    step, params, optimizer = recipe_step(settings, batch, gather(mesh))
    state = jax.eval_shape(lambda params: new_state(params, optimizer, ema=False), params)
    metrics = jax.eval_shape(train_metrics)
    shardings = state_shardings(mesh, state)
    rows = {"image": jax.ShapeDtypeStruct((batch, *settings["image_size"], 3), np.uint8)}
    rows["label"] = jax.ShapeDtypeStruct((batch,), np.int32)
    seed = shaped(jax.ShapeDtypeStruct((), np.uint32), replicated(mesh))
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))
    arguments = (shaped(state, shardings), shaped(metrics, replicated(mesh)))
    return jitted.trace(*arguments, shaped(rows, batch_sharding(mesh)), seed)


def report(text, device, flops):
    """Print the estimate by kinds, and the share of the peak that it allows for so many needed FLOPs."""
    _, bandwidth, peak = DEVICES[device]
    found, least, collectives = kernels(text), collections.Counter(), collections.Counter()
    for kernel in found:
        least[kernel.kind] += kernel.times * max(kernel.moved / bandwidth, kernel.flops / peak) * 1e3
        if re.fullmatch(COLLECTIVE, kernel.opcode):
            collectives[kernel.opcode] += kernel.times
    whole, moved = sum(least.values()), sum(kernel.times * kernel.moved for kernel in found)
    count, share = sum(kernel.times for kernel in found), flops / peak / whole * 1e3
    print(f"  {count} kernels move {moved / 1e9:.0f} GB")
    print(f"  {whole:9.1f} ms by this estimate, {share:.0%} of the peak")
    for kind, milliseconds in least.most_common():
        print(f"  {milliseconds:9.1f} ms {milliseconds / whole:6.1%}  {kind}")
    for kind, times in collectives.most_common():
        print(f"  {times:9} x {kind}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="convit_small@224")
    parser.add_argument("--batch", type=int, default=512, help="global")
    parser.add_argument("--programs", default="convit", help="as of benchmarks.model")
    parser.add_argument("--task", default="training", choices=("training", "inference"))
    parser.add_argument("--mesh", help="as 1x8: the recipe's step on data x fsdp devices")
    parser.add_argument("--device", default="h200", choices=DEVICES)
    parser.add_argument(
        "--settings", type=json.loads, default={"dtype": "bfloat16"}, help="of the model, as JSON"
    )
    parser.add_argument("--text", help="folder for the compiled programs")
    options = parser.parse_args()
    programs = options.programs.split(",")
    for program in programs:
        if program in PEERS or not known(program):
            parser.error(
                f"--programs has {program}: there are convit and plain, in no or some of {', '.join(WAYS)}"
            )
    model, size = options.model.split("@")
    data, fsdp = map(int, (options.mesh or "1x1").split("x"))
    mesh = described_mesh(options.device, data, fsdp)
    task = f"the recipe's step on {options.mesh} devices" if options.mesh else options.task
    print(f"{options.model}, batch {options.batch}, {task}, {options.device}, jax {jax.__version__}")
    for program in programs:
        settings = model_settings(model, image_size=int(size), **options.settings)
        with as_in(program, settings) as settings, mock.patch.object(fused, "available", return_value=True):
            if options.mesh:
                step = traced_recipe(settings, options.batch, mesh)
            else:
                step = traced(settings, options.batch, options.task, mesh)
            lowered = step.lower()
        began = time.perf_counter()
        compiled = lowered.compile()
        text = compiled.as_text()
        print(f"{program}: {megabytes(compiled):.0f} MB; compiled in {time.perf_counter() - began:.0f} s")
        if options.text:
            name = re.sub(r"\W+", "-", f"{options.model} {options.batch} {task} {program} {options.device}")
            Path(options.text).mkdir(parents=True, exist_ok=True)
            Path(options.text, name).write_text(text)
        passes = 1 if task == "inference" else 3
        report(text, options.device, 2 * count_macs(settings) * passes * options.batch / (data * fsdp))


if __name__ == "__main__":
    main()
