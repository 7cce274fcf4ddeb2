"""Where the time of a whole training step goes, by the profiler: the recipe's step, augmentation included.

    python -m benchmarks.where --batch=512 --settings='{"dtype": "bfloat16"}'       # a GPU
    python -m benchmarks.where --model=convit_tiny --batch=16

What belongs to which kind: benchmarks/hlo.py. Times are sums over operations: on a CPU several run at once.
The clock is read without the profiler.
"""

import argparse
import collections
import json
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from benchmarks.hlo import kinds

from benchmarks.augment import photos
from configs import default
from convit_jax.models.variants import abstract_model, initial_params, model_settings
from convit_jax.training.optimizer import make_optimizer
from convit_jax.training.step import make_train_step, new_state, train_metrics


def times(folder):
    """Milliseconds of each operation in a profile, summed over its calls."""
    found = collections.Counter()
    (profile,) = Path(folder).rglob("*.xplane.pb")
    for plane in jax.profiler.ProfileData.from_file(str(profile)).planes:
        lines = list(plane.lines)
        streams = [line for line in lines if line.name.startswith("Stream")]  # else summaries count twice
        for line in streams or lines:
            for event in line.events:
                operation = dict(event.stats).get("hlo_op")
                if operation is not None:
                    found[operation] += event.duration_ns / 1e6
    return found


def recipe_step(settings, batch, whole=lambda tree: tree):
    """(training step of the recipe for a model_settings(), shapes of its parameters, optimizer)."""
    config = default.get_config()
    config.batch_size = batch
    graphdef, shapes = abstract_model(settings)
    optimizer = make_optimizer(config.optim, lambda _: 1e-4, shapes)
    step = make_train_step(graphdef, optimizer, lambda _: 1e-4, config, settings["num_classes"], whole)
    return step, shapes, optimizer


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="convit_small")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--settings", type=json.loads, default={}, help="of the model, as JSON")
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    settings = model_settings(options.model, image_size=options.image_size, **options.settings)
    step, _, optimizer = recipe_step(settings, options.batch)
    pixels = np.resize(
        photos(min(options.batch, 32), options.image_size), (options.batch, *settings["image_size"], 3)
    )
    labels = np.arange(options.batch, dtype=np.int32) % settings["num_classes"]
    seed, batch = jax.device_put((np.uint32(0), {"image": pixels, "label": labels}))
    start = jax.jit(lambda params: (new_state(params, optimizer, ema=False), train_metrics()))
    carried = start(initial_params(settings, 0))
    compiled = jax.jit(step, donate_argnums=0).lower(*carried, batch, seed).compile()

    def run(carried):
        """So many steps: what they carry on, and milliseconds a step."""
        began = time.perf_counter()
        for _ in range(options.steps):
            carried = compiled(*carried, batch, seed)
        jax.block_until_ready(carried)
        return carried, (time.perf_counter() - began) / options.steps * 1e3

    carried, _ = run(carried)
    carried, wall = run(carried)
    print(f"{options.model}@{options.image_size}, batch {options.batch}, {jax.devices()[0].device_kind}")
    print(f"{wall:9.1f} ms a step by the clock", flush=True)  # first: reading a profile takes long, or fails
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run(carried)
        found = times(folder)
    of, sums = kinds(compiled.as_text()), collections.Counter()
    for operation, milliseconds in found.items():
        kind = of.get(operation, "not in the program's text")
        if kind is not None:
            sums[kind] += milliseconds / options.steps
    whole = sum(sums.values())
    print(f"{whole:9.1f} ms as the sum of its operations, of which")
    for name, milliseconds in sums.most_common():
        print(f"{milliseconds:9.1f} ms {milliseconds / whole:6.1%}  {name}")


if __name__ == "__main__":
    main()
