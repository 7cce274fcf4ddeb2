"""The training loop: batch, step, log, save, evaluate.

All state is one tree of plain arrays, and all randomness a function of (seed, step, example): a run that was
stopped anywhere continues bit for bit. The device never waits for the host, see `reports.Reports`.
"""

import contextlib
import os
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from convit_jax.training.evaluation import evaluate
from convit_jax.training.reports import Reports
from convit_jax.training.setup import Training
from convit_jax.training.sharding import put_batch
from convit_jax.training.step import State
from convit_jax.training.stop import Stop


def train(config: ConfigDict, workdir: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Trains a model, or continues a run that was stopped.

    Args:
      config: fields of configs/default.py.
      workdir: run directory; gets config.json, run.json, metrics.jsonl, tensorboard/ and checkpoints/.

    Returns:
      The last line of metrics.jsonl with an evaluation (step, epoch, val_top1 and val_top5 in per cent,
      val_loss, ...), or None if a signal stopped the run. Only the first of several processes writes.

    Raises:
      UserError: a config, data or disk that cannot be used, or a loss that is not finite.
    """
    with contextlib.ExitStack() as stack:
        run = Training(config, Path(workdir).expanduser(), stack)
        stop, reports = stack.enter_context(Stop()), stack.enter_context(Reports(run))
        state, sums, step = run.state, run.sums, run.first_step
        if step == 0 and (looks := run.attention_log(state["params"])):
            run.log.write(step, 0.0, looks)
        evaluate_if_due(run, state, step, stop)  # a run that was stopped before its evaluation

        while step < run.plan.total_steps and not stop.poll(step):
            # ---- Batch -------------------------------------------------------------------------
            with reports.waiting():
                batch = put_batch(next(run.batches), run.mesh)

            # ---- Step --------------------------------------------------------------------------
            if step == run.first_step:
                run.compile_step(batch)
            with jax.transfer_guard("disallow"):  # only put_batch may send anything to the device
                state, sums = run.steps.train(state, sums, batch)
            del batch  # frees its memory when the step is done, not one step later
            step += 1

            # ---- Log ---------------------------------------------------------------------------
            sums = reports.add(step, sums)

            # ---- Save, then evaluate: what fails in an evaluation loses no step ----------------
            if step in run.plan.eval_at or step % config.checkpoint_every == 0:
                reports.finish(sums)
                run.checkpoints.save(step, {"state": state, "metrics": sums})
                evaluate_if_due(run, state, step, stop)
                reports.restart_clock()

        # ---- The end; saves nothing if this step is saved --------------------------------------
        reports.finish(sums)
        run.checkpoints.save(step, {"state": state, "metrics": sums})
        run.checkpoints.wait()  # while signals are still handled

    if stop.requested and run.plan.total_steps not in run.log.top1:  # else the signal came after the end
        where = f", saved in {run.workdir}" if step else ", before the first step"
        run.progress.say(f"Stopped by {stop.requested} at step {step}{where}. Run the same command to continue.")
        return None
    return run.log.last


def evaluate_if_due(run: Training, state: State, step: int, stop: Stop) -> None:
    """Evaluates and logs the weights and their moving average, if the plan says so; a signal ends it."""
    if step not in run.plan.eval_at or step in run.log.top1:
        return
    run.progress.wait("evaluating")
    models = {"val": state["params"]} | ({"val_ema": state["ema"]} if "ema" in state else {})
    results = evaluate(models, run.test_batches(), run.steps.evaluate, run.mesh, stopped=lambda: stop.poll(step))
    if results is None:
        return
    epoch, names = run.plan.epoch(step), ("top1", "top5", "loss")
    values = {f"{model}_{name}": results[model][name] for model in models for name in names}
    run.checkpoints.wait()  # the log must not describe weights that a full disk has lost
    run.log.write(step, epoch, values | run.attention_log(state["params"]))
    shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
    run.progress.say(f"step {step}/{run.plan.total_steps}  epoch {epoch:.1f}  {shown}")
