"""One program of benchmarks.model, ConViT or the plain network, in its own process.

Reads requests `TASK SECONDS` from standard input and answers each with a line of JSON. Tasks: inference
(logits), training (forward, backward, AdamW; no augmentation, no stochastic depth) and peak (a large
matrix product). first_step counts the seconds to make the optimizer's state, trace, compile or load from the
cache, and run one step, with weights and images in place.
"""

import argparse
import contextlib
import json
import sys
import time
from unittest import mock

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from convit_jax.models import vit
from convit_jax.models.attention import SelfAttention
from convit_jax.models.variants import abstract_model, count_macs, initial_params, model_settings


class PlainAttention(SelfAttention):
    """Self-attention with GPSA's arguments: same tokens, heads and sizes, no position."""

    def __init__(self, dim, num_heads, grid, *, conv_init, locality_strength, gate_init, **settings):
        super().__init__(dim, num_heads, **settings)


def architecture(program):
    """Returns a context in which models are those of a program, "convit" or "plain"."""
    if program == "convit":
        return contextlib.nullcontext()
    return mock.patch.object(vit, "GatedPositionalSelfAttention", PlainAttention)


def compile_step(function, *arguments, donate=()):
    """Returns (compiled function, MB that XLA needs for arguments, results and temporaries)."""
    compiled = jax.jit(function, donate_argnums=donate).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    return compiled, (needed + memory.output_size_in_bytes - memory.alias_size_in_bytes) / 1e6


def make_inference(graphdef, params, images):
    """Returns (function that starts one step and returns what to wait for, MB it needs)."""
    forward, needed = compile_step(lambda params, images: nnx.merge(graphdef, params)(images), params, images)
    return lambda: forward(params, images), needed


def make_training(graphdef, params, images):
    """As make_inference(); each step changes the weights."""
    optimizer = optax.adamw(1e-3, weight_decay=0.05)
    rows, classes = len(images), params["head"]["bias"].shape[0]

    @jax.jit
    def start(params):
        params = jax.tree.map(jnp.copy, params)  # the step overwrites them
        return (params, optimizer.init(params)), jax.nn.one_hot(jnp.arange(rows) % classes, classes)

    def loss_fn(params, images, targets):
        return jnp.mean(optax.softmax_cross_entropy(nnx.merge(graphdef, params)(images), targets))

    def step(state, images, targets):
        params, opt_state = state
        grads = jax.grad(loss_fn)(params, images, targets)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    state, targets = start(params)
    compiled, needed = compile_step(step, state, images, targets, donate=0)

    def once():
        nonlocal state
        state = compiled(state, images, targets)
        return state[1][0].count

    return once, needed


def make_peak(dtype):
    """Returns (function that starts a large square product, its FLOPs)."""
    size = 8192 if jax.default_backend() == "gpu" else 2048
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    multiply = jax.jit(lambda x: x @ x)
    jax.block_until_ready(multiply(x))  # compiled and tuned
    return lambda: multiply(x), 2 * size**3


def steps_per_second(once, seconds):
    """Returns the rate over about `seconds`, after one more step to warm up."""
    began = time.perf_counter()
    jax.block_until_ready(once())
    steps = max(1, round(seconds / (time.perf_counter() - began)))
    began = time.perf_counter()
    for _ in range(steps):
        last = once()
    jax.block_until_ready(last)
    return steps / (time.perf_counter() - began)


def serve(settings, batch):
    """Answers requests until there are no more."""
    graphdef, params = abstract_model(settings)[0], initial_params(settings, 0)
    images = jax.random.normal(jax.random.key(1), (batch, *settings["image_size"], 3))
    jax.block_until_ready((params, images))
    for line in sys.stdin:
        task, seconds = line.split()
        answer = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
        if task == "peak":
            once, flops = make_peak(settings["dtype"])
            answer["flops"] = flops * steps_per_second(once, float(seconds))
        else:
            began = time.perf_counter()
            make = {"inference": make_inference, "training": make_training}[task]
            once, answer["program_mb"] = make(graphdef, params, images)
            jax.block_until_ready(once())
            answer["first_step"] = time.perf_counter() - began
            answer["images_per_second"] = batch * steps_per_second(once, float(seconds))
            answer["macs"] = count_macs(settings)
        print(json.dumps(answer), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--program", choices=("convit", "plain"), required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--image_size", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--settings", type=json.loads, default={}, help="of the model, as JSON")
    options = parser.parse_args()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    with architecture(options.program):
        settings = model_settings(options.model, image_size=options.image_size, **options.settings)
        serve(settings, options.batch)


if __name__ == "__main__":
    main()
