"""Orbax behind four functions: open, save, restore, close.

A checkpoint is written to the side and renamed when it is whole, in the background; the latest
and the one with the best val_top1 are kept. Restoring goes into an abstract tree with today's
shardings, so that a run moves between numbers of devices.
"""

import contextlib
import errno
import os
from pathlib import Path

import jax
from orbax.checkpoint import v1 as ocp

from convit_jax.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def open_checkpoints(directory):
    """A handle on a directory of checkpoints, made if it is not there."""
    keep = ocp.training.preservation_policies
    return ocp.training.Checkpointer(
        Path(directory).absolute(),
        preservation_policy=keep.AnyPreservationPolicy(
            [keep.LatestN(1), keep.BestN(n=1, get_metric_fn=_top1, keep_checkpoints_without_metrics=False)]
        ),
        cleanup_tmp_directories=True,
    )


def _top1(metrics):
    return metrics["val_top1"]


def save(checkpoints, step, tree, metrics=None):
    """Start writing a tree of arrays as the checkpoint of a step; waits only for the one before.

    metrics: {"val_top1": per cent} where the step was evaluated.

    Raises:
      UserError: the checkpoint before this one could not be written.
    """
    with _storage_errors(checkpoints):
        checkpoints.save_async(step, tree, force=True, metrics=metrics)


def restore(checkpoints, shapes, shardings, step=None):
    """The tree saved at a step (None: the latest), of these shapes and dtypes, placed by these shardings."""
    abstract = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes, shardings
    )
    return checkpoints.load(step, abstract)


def close(checkpoints):
    """Wait until everything is on disk. Raises UserError if it could not be written."""
    with _storage_errors(checkpoints):
        checkpoints.close()


@contextlib.contextmanager
def _storage_errors(checkpoints):
    """Turn a full or unwritable disk into one sentence."""
    try:
        yield
    except Exception as error:
        full = any(getattr(error, "errno", None) == code or os.strerror(code) in str(error) for code in FULL)
        if not full and not isinstance(error, OSError):
            raise
        cause = "the disk is full" if full else str(error)
        # A checkpoint takes its name, the step, when it is whole.
        whole = [int(path.name) for path in Path(checkpoints.directory).iterdir() if path.name.isdigit()]
        kept = f"the last good one is of step {max(whole)}" if whole else "there is no earlier one"
        raise UserError(
            f"A checkpoint could not be written to {checkpoints.directory} ({cause}); {kept}. "
            "Make room and start the same command again: it continues from there."
        ) from error
