"""Seconds and compilations of the Python API: create_model, eager calls and gradients, and eager against jitted calls.

python -m benchmarks.eager
"""

import statistics
import time

import jax
import numpy as np
from flax import nnx

import convit_jax

compiled = []


def seconds(function, *arguments, words=""):
    """Returns the time of a call; prints it with the number of compilations after `words`, if there are any."""
    compiled.clear()
    began = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    taken = time.perf_counter() - began
    if words:
        print(f"{words:40} {taken:6.2f} s  {len(compiled):3} compilations", flush=True)
    return taken


def measure(name, batch):
    """Prints the figures of a model for batches of this size."""
    for count in ("first", "second"):
        seconds(lambda: nnx.state(convit_jax.create_model(name)), words=f"create_model({name!r}), {count}")
    model, images = convit_jax.create_model(name), np.zeros((batch, 224, 224, 3), np.float32)
    for method in ("__call__", "features", "attention_maps"):
        for count in ("first", "second"):
            seconds(getattr(model, method), images, words=f"  {method}, {count}")
    gradient = nnx.grad(lambda model: model(images).mean())
    for count in ("first", "second"):
        seconds(gradient, model, words=f"  gradient, {count}")
    graphdef, params = nnx.split(model)
    jitted = jax.jit(lambda params, images: nnx.merge(graphdef, params)(images))
    seconds(jitted, params, images)
    ratios = [seconds(model, images) / seconds(jitted, params, images) for _ in range(7)]
    print(f"  eager / jitted, in alternation: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    measure("convit_tiny", 4)
    measure("convit_base", 1)
