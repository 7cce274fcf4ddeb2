"""What measuring gates and non-locality costs, next to the evaluation that it comes with.

    python -m benchmarks.locality [--config=FILE] [--images=N] [--rounds=3] [--config.FIELD=VALUE]

Both as the training loop does them, with new weights, on one device: an evaluation of the test (or of its
first N images), then the measuring and the writing of the line; in turn, after one of each that compiles.
"""

import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import jax
from absl import flags

from convit_jax.cli import launch
from convit_jax.data.examples import Unreadable
from convit_jax.data.loader import batches
from convit_jax.models.variants import abstract_model, initial_params
from convit_jax.training.attention_log import image_count, make_attention_log
from convit_jax.training.evaluation import evaluate
from convit_jax.training.metrics import MetricsLog
from convit_jax.training.plan import make_plan
from convit_jax.training.sharding import make_mesh
from convit_jax.training.step import eval_metrics, make_eval_step


def define():
    flags.DEFINE_integer("images", None, "Evaluate so many of the test's images only.")
    flags.DEFINE_integer("rounds", 3, "Turns of either.")


def main(_):
    config = flags.FLAGS.config
    plan, mesh = make_plan(config, devices=1), make_mesh(1, 1)
    plan = dataclasses.replace(
        plan, test=dataclasses.replace(plan.test, indices=plan.test.indices[: flags.FLAGS.images])
    )
    graphdef, _ = abstract_model(plan.model)
    params = initial_params(plan.model, config.seed)
    eval_step = jax.jit(make_eval_step(graphdef, config))
    images = len(plan.test.indices)
    steps = -(-images // config.eval_batch_size)
    unreadable = Unreadable(plan.test.source, config.data.max_unreadable, print)

    def evaluation():
        rows = batches(plan.test, batch_size=config.eval_batch_size, start=0, stop=steps)
        evaluate({"val": params}, map(unreadable.take, rows), eval_step, eval_metrics(), mesh)

    def timed(function):
        began = time.perf_counter()
        function()
        return time.perf_counter() - began

    with tempfile.TemporaryDirectory() as folder:
        log = MetricsLog(Path(folder), 0, {})
        attention_log = make_attention_log(graphdef, config, plan, mesh)
        tasks = (evaluation, lambda: log.write(0, 0.0, attention_log(params)))
        first = [timed(task) for task in tasks]
        turns = [[timed(task) for task in tasks] for _ in range(flags.FLAGS.rounds)]
        seconds = [statistics.median(column) for column in zip(*turns, strict=True)]
        log.close()
    print(f"{seconds[0]:10.4f} s  evaluation of {images} images (the first, compiling: {first[0]:.1f} s)")
    print(
        f"{seconds[1]:10.4f} s  gates and non-locality of {image_count(config, images)} images (the first, "
        f"compiling: {first[1]:.1f} s)"
    )
    print(f"{100 * seconds[1] / seconds[0]:10.2f} %  of the evaluation")


if __name__ == "__main__":
    launch("locality", main, define=define, config="configs/digits.py")
