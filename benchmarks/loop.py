"""Compares the training loop on one synthetic batch with the jitted step it calls.

    python -m benchmarks.loop [--config=FILE] [--config.steps=200] [--rounds=3] [--config.FIELD=VALUE]

The loop is convit_jax.training.loop.train with a batch that is always ready: it puts the batch on the
device, starts steps ahead, sums, checks and logs. The bare step gets the same batch, already on the device.
Each runs in its own process and they take turns. A result is the median of the windows of log_every steps
without the first (four windows by default), without evaluations and checkpoints.
"""

import itertools
import json
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
from convit_jax.models.variants import initial_params
from convit_jax.rundir import read_metrics
from convit_jax.training import evaluation, setup
from convit_jax.training.autotune import choose_forms
from convit_jax.training.loop import train
from convit_jax.training.plan import follow_weights, make_plan
from convit_jax.training.sharding import make_mesh, put_batch

TITLES = {"loop": "the whole training loop", "step": "the bare jitted step"}


def prepare(config):
    """Changes a config to what both programs run: a list of images of which none is read, one evaluation."""
    config.steps = config.steps or 4 * config.log_every
    config.data.name = "digits"
    config.epochs = config.eval_every = 10_000
    config.checkpoint_every = config.steps
    config.eval_batch_size, config.locality.images = config.batch_size, 0
    config.model.num_classes = config.model.num_classes or 1000


def random_batch(config):
    """Returns random pixels and labels of a training batch."""
    rng, size = np.random.default_rng(0), config.model.image_size
    return {
        "image": rng.integers(0, 256, (config.batch_size, size, size, 3), np.uint8),
        "label": rng.integers(0, 10, config.batch_size, np.int32),
    }


def loop_rates(config):
    """Returns the images/s of each window of the loop."""
    more = {"unreadable": np.full(config.batch_size, -1), "valid": np.ones(config.batch_size, bool)}

    def batches(example, *, start, stop, **_):
        """Yields the batch, as a training or an evaluation batch."""
        yield from itertools.repeat(random_batch(config) | more, stop - start)

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(evaluation, "batches", batches):
        train(config, folder)
        lines = read_metrics(Path(folder) / "metrics.jsonl")
        return [line["images_per_second"] for line in lines if "images_per_second" in line]


def step_rates(config):
    """Returns the images/s of each window of the step alone."""
    setup.use_compilation_cache(config.compilation_cache)
    mesh = make_mesh(1, 1)
    config = follow_weights(config)
    plan = choose_forms(config, make_plan(config, devices=1), 1, None)
    steps = setup.Steps(config, plan, mesh)
    tree = steps.first(initial_params(plan.model, config.seed))
    state, sums = tree["state"], tree["metrics"]
    batch = put_batch(random_batch(config), mesh)
    rates = []
    for _ in range(config.steps // config.log_every):
        began = time.perf_counter()
        for _ in range(config.log_every):
            state, sums = steps.train(state, sums, batch)
        jax.block_until_ready(sums)
        rates.append(config.log_every * config.batch_size / (time.perf_counter() - began))
    return rates


def _define_flags():
    flags.DEFINE_integer("rounds", 3, "Turns of each program.")
    flags.DEFINE_enum("program", None, list(TITLES), "Run only this program once and print its images/s.")
    flags.DEFINE_string("json", None, "File for the results.")


def main(_):
    values, config = flags.FLAGS, flags.FLAGS.config
    if values.program:
        prepare(config)
        rates = {"loop": loop_rates, "step": step_rates}[values.program](config)[1:]
        print(f"\n{statistics.median(rates)}")
        return
    rates = {name: [] for name in TITLES}
    with tempfile.TemporaryDirectory() as cache:
        for round_number in range(values.rounds):
            for name in sorted(rates, reverse=round_number % 2):
                command = [sys.executable, "-m", "benchmarks.loop", *sys.argv[1:], f"--program={name}"]
                command.append(f"--config.compilation_cache={cache}")
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                rates[name].append(float(done.stdout.splitlines()[-1]))
                print(f"{rates[name][-1]:10.2f} images/s  {TITLES[name]}", flush=True)
                if values.json:
                    Path(values.json).write_text(json.dumps(rates, indent=1))
    ratios = [a / b for a, b in zip(rates["loop"], rates["step"], strict=True)]
    for name, title in TITLES.items():
        print(f"{statistics.median(rates[name]):10.2f} images/s  {title}, median")
    print(f"{statistics.median(ratios):10.3f} x, {min(ratios):.3f} to {max(ratios):.3f}")


if __name__ == "__main__":
    launch("loop", main, define=_define_flags, config="configs/convit_s.py")
