"""Checkpoints of a run, written in the background by Orbax: the latest and the best one are kept."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from orbax.checkpoint import v1 as ocp

from convit_jax.rundir import NO_SPACE, disk_errors
from convit_jax.training.distributed import from_any, is_first, together
from convit_jax.weights.run import Damaged, reading

# Each device that holds a copy of an array saves a part of it, unless the part is smaller than this. Every
# shape of part is a program to compile: hundreds of them for the small arrays of a model.
SMALLEST_PART = 2**20  # bytes


class Checkpoints:
    """The checkpoints in a directory; all processes call the methods together. UserError: one cannot be written."""

    def __init__(self, directory: Path, top1: Mapping[int, float]) -> None:
        """top1: {step: val_top1}, which the owner keeps up to date."""
        self.directory, self._top1 = directory.absolute(), top1
        self._orbax = self._open()
        self.saved = 0  # step that needs no saving: at first 0, which is made from the seed

    def _open(self) -> ocp.training.Checkpointer:
        context = ocp.Context()
        context.array.saving.min_slice_bytes_for_replica_parallel = SMALLEST_PART
        return ocp.training.Checkpointer(
            self.directory, preservation_policy=self, cleanup_tmp_directories=True, context=context
        )

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Tells Orbax which checkpoints to keep, in order of their steps: the latest, and the best by top-1 so far."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = max(steps, key=lambda step: (self._top1.get(step, -1.0), step), default=None)
        return [step in (steps[-1], best) for step in steps]

    def set_aside(self, steps: Sequence[int]) -> None:
        """Moves damaged checkpoints, with a copy of the log, into a new folder of damaged/."""
        if not steps:
            return
        with together(), disk_errors(self.directory):
            if is_first():
                (self.directory.parent / "damaged").mkdir(exist_ok=True)
                folder = Path(tempfile.mkdtemp(prefix="checkpoints-", dir=self.directory.parent / "damaged"))
                for step in steps:
                    os.replace(self.directory / str(step), folder / str(step))
                with contextlib.suppress(FileNotFoundError):
                    shutil.copy(self.directory.parent / "metrics.jsonl", folder)
        self._orbax = self._open()  # it keeps a list of what is there

    def save(self, step: int, tree: Any) -> None:
        """Starts to write a step's tree of arrays, which may be donated at once; does nothing if it is saved."""
        if step == self.saved:
            return
        with self._storage_errors():
            self._orbax.save_async(step, tree, force=True)
        self.saved = step

    def restore(self, step: int, wanted: Any) -> Any:
        """Returns the tree saved at a step as a tree of ShapeDtypeStruct, with shardings, asks for it.

        Raises Damaged, or UserError if it may be whole, if any process cannot read it.
        """
        self.saved, path = step, self.directory / str(step)
        # Orbax counts the loads, except where this file is missing: were the counts to differ, saving would hang.
        _on_all(path, (path / "state/_METADATA").stat)
        return _on_all(path, lambda: ocp.load(path, wanted))

    def wait(self) -> None:
        """Waits until everything is on the disk."""
        with self._storage_errors():
            self._orbax.wait()

    def close(self) -> None:
        """Waits as `wait` does, and ends the writer."""
        with self._storage_errors():
            self._orbax.close()

    @contextlib.contextmanager
    def _storage_errors(self) -> Iterator[None]:
        with disk_errors(self.directory):
            try:
                yield
            except Exception as error:
                for code in NO_SPACE:
                    if os.strerror(code) in str(error):  # TensorStore's errors are text
                        raise OSError(code, os.strerror(code)) from error
                raise


def _on_all(path: Path, read: Callable[[], Any]) -> Any:
    """read(); if any process finds the checkpoint damaged, all raise Damaged."""
    result = damage = None
    with together():
        try:
            with reading(path):
                result = read()
        except Damaged as error:
            damage = str(error)
    if damage := from_any(damage):
        raise Damaged(damage)
    return result
