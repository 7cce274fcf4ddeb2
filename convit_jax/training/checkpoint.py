"""Orbax behind a few functions: open, save, wait, restore, close.

A checkpoint is written to the side and renamed when it is whole, in the background; the latest
and the one with the best val_top1 are kept. Restoring goes into an abstract tree with today's
shardings, so that a run moves between numbers of devices.
"""

import contextlib
import os
from pathlib import Path

import jax
from orbax.checkpoint import v1 as ocp

from convit_jax.errors import UserError
from convit_jax.rundir import NO_SPACE

# Of an array that all devices hold each saves a part, unless that were less than so many bytes: every
# shape of part is a program to compile, hundreds of them for the small arrays of a model.
WHOLE = 2**20


class LatestAndBest:
    """Keeps the latest checkpoint and the one with the best top-1 so far; top1: {step: val_top1}."""

    def __init__(self, top1):
        self.top1 = top1

    def should_preserve(self, checkpoints, *, context):
        """A bool for each checkpoint, as Orbax's policies give it."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = max(steps, key=lambda step: (self.top1.get(step, -1.0), step), default=None)
        return [step in (steps[-1], best) for step in steps]


def open_checkpoints(directory, top1):
    """A handle on a directory of checkpoints, made if it is not there.

    top1: {step: val_top1 in per cent}, kept up to date by its owner; decides which checkpoint is the best.
    """
    context = ocp.Context()
    context.array.saving.min_slice_bytes_for_replica_parallel = WHOLE
    return ocp.training.Checkpointer(
        Path(directory).absolute(),
        preservation_policy=LatestAndBest(top1),
        cleanup_tmp_directories=True,
        context=context,
    )


def any_in(directory):
    """Whether a directory holds a checkpoint; one takes its name, the step, when it is whole."""
    return directory.is_dir() and any(path.name.isdigit() for path in directory.iterdir())


def save(checkpoints, step, tree):
    """Start writing a tree of arrays as the checkpoint of a step; waits only for the one before.

    Raises:
      UserError: the checkpoint before this one could not be written.
    """
    with _storage_errors(checkpoints):
        checkpoints.save_async(step, tree, force=True)


def restore(checkpoints, shapes, shardings, step=None):
    """The tree saved at a step (None: the latest), of these shapes and dtypes, placed by these shardings."""
    abstract = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes, shardings
    )
    return checkpoints.load(step, abstract)


def wait(checkpoints):
    """Until what was saved is on disk. Raises UserError if it could not be written."""
    with _storage_errors(checkpoints):
        checkpoints.wait()


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
        full = any(
            getattr(error, "errno", None) == code or os.strerror(code) in str(error) for code in NO_SPACE
        )
        if not full and not isinstance(error, OSError):
            raise
        cause = "the disk is full" if full else str(error)
        # A checkpoint takes its name, the step, when it is whole.
        whole = [int(path.name) for path in Path(checkpoints.directory).iterdir() if path.name.isdigit()]
        kept = f"the last good one is of step {max(whole)}" if whole else "there is no earlier one"
        remedy = "it continues from there" if whole else "it begins anew"
        raise UserError(
            f"A checkpoint could not be written to {checkpoints.directory} ({cause}); {kept}. "
            f"Make room and start the same command again: {remedy}."
        ) from error
