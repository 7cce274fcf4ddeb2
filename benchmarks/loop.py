"""The whole training loop with a synthetic source, next to the bare jitted step it calls.

    python -m benchmarks.loop [--config=FILE] [--config.steps=200] [--rounds=3] [--config.FIELD=VALUE]

The loop is convit_jax.training.loop.train with a batch that is always there: it puts the batch on the
device, starts steps ahead, sums, checks and logs. The bare step gets the same batch, on the device once.
Both are processes of their own and take turns; each gives the median of its windows of log_every steps
without the first, of four if config.steps says nothing, and without evaluations and checkpoints.
"""

import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import jax
import numpy as np
from absl import flags

from convit_jax.cli import launch
from convit_jax.data.index import Names
from convit_jax.models.variants import abstract_model, initial_params
from convit_jax.training import loop, plan
from convit_jax.training.optimizer import make_optimizer, run_schedule
from convit_jax.training.step import make_train_step, new_state, train_metrics

TITLES = {"loop": "the whole training loop", "step": "the bare jitted step"}


class Synthetic:
    """A source of so many labels, in 1000 classes, whose images are never read."""

    def __init__(self, count):
        self.labels = np.arange(count, dtype=np.int32) % 1000
        self.names = Names.pack([b"%d" % number for number in range(count)])
        self.class_names = [str(label) for label in range(1000)]

    def __len__(self):
        return len(self.labels)


def open_synthetic(_, split):
    """In the place of data.sources.open_source; with one test image, for a short evaluation at the end."""
    return Synthetic(100_000 if split == "train" else 1)


def one_batch(config, size):
    """Random pixels and labels."""
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (config.batch_size, *size, 3), np.uint8),
        "label": rng.integers(0, 1000, config.batch_size, np.int32),
        "unreadable": np.full(config.batch_size, -1, np.int64),
    }


def whole_loop(config, settings):
    """Images/s of each window of the loop."""
    batch = one_batch(config, settings.model["image_size"])

    def batches(example, *, batch_size, start, stop, **_):
        valid = {} if example is settings.train else {"valid": np.ones(batch_size, bool)}
        yield from itertools.repeat({**batch, **valid}, stop - start)

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(loop, "batches", batches),
        mock.patch.object(loop, "make_plan", return_value=settings),
    ):
        loop.train(config, folder)
        lines = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
        return [line["images_per_second"] for line in lines if "images_per_second" in line]


def bare_step(config, settings):
    """Images/s of each window of the step alone."""
    loop.use_compilation_cache(config.compilation_cache)
    graphdef, shapes = abstract_model(settings.model)
    schedule = run_schedule(config, settings)
    optimizer = make_optimizer(config.optim, schedule, shapes)
    step = jax.jit(
        make_train_step(graphdef, optimizer, schedule, config, settings.model["num_classes"]),
        donate_argnums=0,
    )
    start = jax.jit(functools.partial(new_state, optimizer=optimizer, ema=config.optim.ema_decay > 0))
    state = start(initial_params(settings.model, 0))
    batch = one_batch(config, settings.model["image_size"])
    del batch["unreadable"]
    batch, metrics, seed = jax.device_put((batch, train_metrics(), np.uint32(config.seed)))
    rates = []
    for _ in range(config.steps // config.log_every):
        began = time.perf_counter()
        for _ in range(config.log_every):
            state, metrics = step(state, metrics, batch, seed)
        jax.block_until_ready(metrics)
        rates.append(config.log_every * config.batch_size / (time.perf_counter() - began))
    return rates


def define():
    flags.DEFINE_integer("rounds", 3, "Turns of either program.")
    flags.DEFINE_enum("program", None, ["loop", "step"], "Run only this, once, and print its images/s.")
    flags.DEFINE_string("cache", None, "Folder of compiled programs; a temporary one by default.")
    flags.DEFINE_string("json", None, "File for the results.")


def main(_):
    values, config = flags.FLAGS, flags.FLAGS.config
    config.compilation_cache = values.cache or config.compilation_cache
    config.steps = config.steps or 4 * config.log_every
    if values.program:
        config.data.max_unreadable, config.eval_batch_size = 0, config.batch_size
        config.locality.images = 0  # there are none to look at
        with mock.patch.object(plan, "open_source", open_synthetic):
            settings = plan.make_plan(config, devices=1)
        rates = {"loop": whole_loop, "step": bare_step}[values.program](config, settings)[1:]
        print(f"\nrate {statistics.median(rates)} {time.process_time()}")
        return
    rates = {"loop": [], "step": []}
    with tempfile.TemporaryDirectory() as cache:
        for round_number in range(values.rounds):
            for name in sorted(rates, reverse=round_number % 2):
                command = [sys.executable, "-m", "benchmarks.loop", *sys.argv[1:], f"--program={name}"]
                done = subprocess.run(
                    [*command, f"--cache={cache}"],
                    env=os.environ,
                    stdout=subprocess.PIPE,
                    text=True,
                    check=True,
                )
                rates[name].append(float(done.stdout.splitlines()[-1].split()[1]))
                print(f"{rates[name][-1]:10.2f} images/s  {TITLES[name]}", flush=True)
                if values.json:
                    Path(values.json).write_text(json.dumps({"rates": rates}, indent=1))
    ratios = [a / b for a, b in zip(rates["loop"], rates["step"], strict=True)]
    ratio = statistics.median(ratios)
    for name, title in TITLES.items():
        print(f"{statistics.median(rates[name]):10.2f} images/s  {title}, median")
    print(f"{ratio:10.3f} x, {min(ratios):.3f} to {max(ratios):.3f}; asked for: 0.97")


if __name__ == "__main__":
    launch("loop", main, define=define, config="configs/convit_s.py")
