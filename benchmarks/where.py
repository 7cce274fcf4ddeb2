"""Where the time of a whole training step goes, by the profiler: the recipe's step, augmentation included.

    python -m benchmarks.where --batch=512 --settings='{"dtype": "bfloat16"}'       # a GPU
    python -m benchmarks.where --model=convit_tiny --batch=16

An operation of the compiled program belongs to the first of KINDS that its text or its place in our code
says; to matrix products a fusion that holds one. Loops count by what is inside them. Times are sums over
operations: on a CPU several run at once. The clock is read without the profiler.
"""

import argparse
import collections
import json
import re
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks.augment import NUM_CLASSES, photos
from configs import default
from convit_jax.models.variants import abstract_model, initial_params, model_settings
from convit_jax.training.optimizer import make_optimizer
from convit_jax.training.step import make_train_step, new_state, train_metrics

PRODUCTS = "matrix products"
KINDS = {  # kind: what is looked for in an operation's line and the computation that it calls
    "augmentation": r"/augmentation/",
    "optimizer": r"/optimizer/",
    "attention, position": r"[/(]position[/)]",
    "attention, content": r"[/(]content[/)]",
    PRODUCTS: r" dot\(|gemm|cublas|/dot_general",
    "copies and transpositions": r" (copy|transpose|copy-start|copy-done)\(",
    "loop: what is kept, written and read": r"dynamic[-_]update[-_]slice|dynamic[-_]slice",
    "the rest: norms, GELU, softmax of the loss, sums": r"",
}
LOOP = r" (while|call|conditional)\("  # what is inside them counts


def kinds(text):
    """{operation: kind, or None of a loop} of all operations of a compiled program's text."""
    lines, called, computation = {}, collections.defaultdict(list), ""
    for line in text.splitlines():
        if begins := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            computation = begins[1]
        elif operation := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line):
            lines[operation[1]] = line
            called[computation].append(line)

    def kind(line):
        inside = re.search(r"calls=%?([\w.\-]+)", line)
        fused = called[inside[1]] if inside else []
        result = "\n".join([line, *(each for each in fused if "ROOT" in each)])
        for name, pattern in KINDS.items():
            if re.search(pattern, "\n".join([line, *fused]) if name == PRODUCTS else result):
                return name

    return {name: None if re.search(LOOP, line) else kind(line) for name, line in lines.items()}


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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="convit_small")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--settings", type=json.loads, default={}, help="of the model, as JSON")
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    config = default.get_config()
    config.batch_size = options.batch
    settings = model_settings(options.model, image_size=options.image_size, **options.settings)
    graphdef, shapes = abstract_model(settings)
    optimizer = make_optimizer(config.optim, lambda _: 1e-4, shapes)
    step = make_train_step(graphdef, optimizer, lambda _: 1e-4, config, NUM_CLASSES)
    pixels = np.resize(
        photos(min(options.batch, 32), options.image_size), (options.batch, *settings["image_size"], 3)
    )
    labels = np.arange(options.batch, dtype=np.int32) % NUM_CLASSES
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
