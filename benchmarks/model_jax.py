"""One program of benchmarks.model, ConViT or the plain network, in a process of its own.

Reads requests `TASK SECONDS` from standard input and answers each with a line of JSON. The tasks are
inference (logits), training (forward, backward, AdamW; no augmentation, no stochastic depth) and peak (a
large matrix product). The first request of a task compiles: the answer then has first_step, the seconds
of making the optimizer's state, tracing, compiling or loading from the cache, and one step, with weights and
images in place.
"""

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from convit_jax.models import attention, vit
from convit_jax.models.attention import SelfAttention
from convit_jax.models.variants import abstract_model, count_macs, initial_params, model_settings


class PlainAttention(SelfAttention):
    """In the place of GPSA: same tokens, heads and sizes, no position."""

    def __init__(self, dim, num_heads, grid, *, conv_init, locality_strength, gate_init, **settings):
        super().__init__(dim, num_heads, **settings)


@contextlib.contextmanager
def as_in(program, settings):
    """While it lasts models are those of a program: yields its settings.

    Programs: "convit"; "plain", the same with plain attention everywhere; either in some of model.py's WAYS,
    as in "convit: cuDNN + unrolled".
    """
    base, _, ways = program.partition(": ")
    changed = {
        "cuDNN": {"attention": "cudnn"},
        "unrolled": {"scan_unroll": settings["depth"]},
        "remat": {"remat": True},
    }
    with contextlib.ExitStack() as stack:
        if base == "plain":
            stack.enter_context(mock.patch.object(vit, "GatedPositionalSelfAttention", PlainAttention))
        for way in ways.split(" + ") if ways else ():
            if way in changed:  # every setting is given, whatever the model's name
                settings = model_settings("convit_tiny", **{**settings, **changed[way]})
            else:
                from benchmarks import attention as forms  # not on the path of another checkout

                position = {"position over heads only": forms.over_heads_only, "position dense": forms.dense}
                stack.enter_context(mock.patch.object(attention, "along_axes", position[way]))
        yield settings


def network(settings):
    """(graphdef, parameters) of a model_settings()."""
    graphdef, _ = abstract_model(settings)
    return graphdef, initial_params(settings, 0)


def compiled(function, *arguments, donate=()):
    """(compiled function, MB that it needs for arguments, results and temporaries)."""
    program = jax.jit(function, donate_argnums=donate).lower(*arguments).compile()
    return program, megabytes(program)


def megabytes(program):
    """MB that a compiled program needs on a device."""
    memory = program.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return (needed + memory.output_size_in_bytes - memory.alias_size_in_bytes) / 1e6


def inference(graphdef, params, images):
    """A function that starts one step and returns what to wait for, and the MB it needs."""
    forward, needed = compiled(lambda params, images: nnx.merge(graphdef, params)(images), params, images)
    return lambda: forward(params, images), needed


def training_step(graphdef):
    """((state, images, targets) -> state, optimizer); state: (parameters, state of the optimizer)."""
    optimizer = optax.adamw(1e-3, weight_decay=0.05)

    def loss_fn(params, images, targets):
        return jnp.mean(optax.softmax_cross_entropy(nnx.merge(graphdef, params)(images), targets))

    def step(state, images, targets):
        params, opt_state = state
        grads = jax.grad(loss_fn)(params, images, targets)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return step, optimizer


def training(graphdef, params, images):
    """Likewise; the weights change from step to step."""
    step, optimizer = training_step(graphdef)
    rows, classes = images.shape[0], params["head"]["bias"].shape[0]

    @jax.jit  # as the trainer does: else each of many shapes is a small program
    def start(params):
        params = jax.tree.map(jnp.copy, params)  # the step overwrites them
        return (params, optimizer.init(params)), jax.nn.one_hot(jnp.arange(rows) % classes, classes)

    state, targets = start(params)
    update, needed = compiled(step, state, images, targets, donate=0)

    def once():
        nonlocal state
        state = update(state, images, targets)
        return state[1][0].count

    return once, needed


def matrix_product(dtype):
    """A function that starts a large square product, and its FLOPs."""
    size = 8192 if jax.default_backend() == "gpu" else 2048
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    multiply = jax.jit(lambda x: x @ x)
    return lambda: multiply(x), 2 * size**3


def rate(once, seconds):
    """Steps a second, and a second of processor time, over about so many seconds, after one step more."""
    began = time.perf_counter()
    jax.block_until_ready(once())
    steps = max(1, round(seconds / (time.perf_counter() - began)))
    began, processor = time.perf_counter(), time.process_time()
    for _ in range(steps):
        last = once()
    jax.block_until_ready(last)
    return steps / (time.perf_counter() - began), steps / (time.process_time() - processor)


def peak_memory():
    """MB: of the device, where it says so, else of this process (VmHWM of Linux)."""
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 1e6
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM:"))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--program", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--image_size", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--settings", type=json.loads, default={}, help="of the model, as JSON")
    options = parser.parse_args()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    with as_in(
        options.program, model_settings(options.model, image_size=options.image_size, **options.settings)
    ) as settings:
        serve(settings, options.batch)


def serve(settings, batch):
    """Answer requests until there are no more."""
    graphdef, params = network(settings)
    images = jax.random.normal(jax.random.key(1), (batch, *settings["image_size"], 3))
    jax.block_until_ready((params, images))
    ready = {}
    for line in sys.stdin:
        task, seconds = line.split()
        answer = {}
        if task == "peak":
            if task not in ready:
                ready[task] = matrix_product(settings["dtype"])
                jax.block_until_ready(ready[task][0]())  # compiled and tuned
            once, flops = ready[task]
            answer["flops"], _ = [flops * x for x in rate(once, float(seconds))]
        else:
            if task not in ready:
                began, processor = time.perf_counter(), time.process_time()
                ready[task] = {"inference": inference, "training": training}[task](graphdef, params, images)
                jax.block_until_ready(ready[task][0]())
                answer["first_step"] = time.perf_counter() - began
                answer["first_step_processor"] = time.process_time() - processor
            once, answer["program_mb"] = ready[task]
            if float(seconds):
                steps = rate(once, float(seconds))
                answer["images_per_second"], answer["images_per_processor_second"] = (
                    batch * x for x in steps
                )
            if task == "training":  # inference needs less, and may come after it
                answer["peak_mb"] = peak_memory()
            answer["macs"] = count_macs(settings)
        device = jax.devices()[0]
        print(json.dumps({**answer, "device": device.device_kind, "jax": jax.__version__}), flush=True)


if __name__ == "__main__":
    main()
