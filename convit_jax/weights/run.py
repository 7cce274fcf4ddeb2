"""Reads the parameters in a run directory. It changes nothing, so the run may still be training."""

import contextlib
import logging
import os
import re
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from convit_jax.errors import UserError
from convit_jax.rundir import checkpoint_steps, read_scores

SYSTEM = (OSError, MemoryError, RuntimeError)  # may pass; RuntimeError: no thread could start
DATA = (FileNotFoundError, IsADirectoryError, NotADirectoryError, NotImplementedError, RecursionError)  # do not


class Damaged(UserError):
    """A checkpoint that no further attempt can read."""


def read_run(directory: Path, step: int, ema: bool) -> dict[str, Any]:
    """Returns the parameters in a run's checkpoint, a nested dict of float32 numpy arrays."""
    path = (directory / "checkpoints" / str(step)).absolute()
    part = "ema" if ema else "params"
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    try:
        with reading(path):
            shapes = ocp.metadata(path).metadata
            wanted = jax.tree.map(lambda _: ..., shapes)  # leaves that are not read
            if part in wanted["state"]:
                wanted["state"][part] = jax.tree.map(
                    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), shapes["state"][part]
                )
                return jax.device_get(ocp.load(path, wanted)["state"][part])
    except Damaged as error:
        raise UserError(f"{error}: try the other one with which=latest or best.") from error
    raise UserError(
        f"the run in {directory} kept no moving average of its weights: leave ema out, or train with "
        "--config.optim.ema_decay=0.9999."
    )


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what a damaged checkpoint raises inside into Damaged, without a remedy, and other errors into a UserError.

    Each of several processes reads by itself and waits for no other, which may have failed.
    """
    context, me = ocp.Context(), ocp.multihost.process_index()
    context.multiprocessing.primary_host, context.multiprocessing.active_processes = me, {me}
    try:
        with context, _without_traces():
            yield
    except Exception as error:  # Orbax raises all kinds
        cause = _cause(error)
        if isinstance(cause, (KeyboardInterrupt, jax.errors.JaxRuntimeError)):  # Ctrl-C, or of the device
            raise cause from None
        reason = textwrap.shorten(str(cause), 150) or type(cause).__name__
        if isinstance(cause, SYSTEM) and not isinstance(cause, DATA):
            words = "it may be whole: check the disk, its permissions and the memory, and run the same command again."
            raise UserError(f"cannot read {path} ({reason}): {words}") from error
        raise Damaged(f"cannot read {path} ({reason})") from error


def _cause(error: BaseException) -> BaseException:
    """The first of the errors that led to one, as an OSError where TensorStore's text has an error of the system."""
    while error.__cause__ is not None:
        error = error.__cause__
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return OSError(int(code[1]), os.strerror(int(code[1]))) if code else error


@contextlib.contextmanager
def _without_traces() -> Iterator[None]:
    """Drops what Python prints of the reads that a failure leaves behind; they end at any time after it."""
    report, logger = sys.unraisablehook, logging.getLogger("asyncio")

    def report_others(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    with contextlib.ExitStack() as restored:
        restored.enter_context(warnings.catch_warnings())
        restored.callback(setattr, sys, "unraisablehook", report)
        restored.callback(logger.setLevel, logger.level)
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        sys.unraisablehook = report_others
        logger.setLevel(logging.CRITICAL)
        try:
            yield
        except BaseException:
            restored.pop_all()  # they stay after a failure
            raise


def find_step(directory: Path, which: str, ema: bool) -> int:
    """Returns the step of the checkpoint "latest", or "best" by val_top1 (with `ema` by val_ema_top1)."""
    if which not in ("best", "latest"):
        raise UserError(f"there is no checkpoint {which!r}: choose best or latest.")
    steps = checkpoint_steps(directory)
    if not steps:
        raise UserError(f"the run in {directory} has not saved a checkpoint yet: let it train longer.")
    top1 = read_scores(directory / "metrics.jsonl", "val_ema_top1" if ema else "val_top1")
    return max(steps, key=lambda step: (top1.get(step, -1.0) if which == "best" else 0.0, step))
