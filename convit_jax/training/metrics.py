"""Where the numbers of a run go: metrics.jsonl and TensorBoard."""

import contextlib
import json
import time
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from convit_jax.rundir import atomic_write, disk_errors, read_metrics
from convit_jax.training.distributed import from_first


class MetricsLog:
    """DIR/metrics.jsonl and DIR/tensorboard of a run, and its evaluations so far; UserError if the disk is full."""

    def __init__(self, directory: Path | None, start_step: int, top1: dict[int, float]) -> None:
        """Drops what an earlier start has written after `start_step`, or all at step 0.

        directory: None on the processes that write nothing. top1: is kept up to date, {step: val_top1}.
        """
        self.top1, self._directory = top1, directory
        lines: list[dict[str, Any]] = []
        if directory:
            with disk_errors(directory):
                path, board = directory / "metrics.jsonl", directory / "tensorboard"
                lines = [line for line in read_metrics(path) if start_step and line["step"] <= start_step]
                with atomic_write(path) as file:
                    file.writelines(json.dumps(line) + "\n" for line in lines)
                self._file = path.open("a", buffering=1)
                board.mkdir(exist_ok=True)
                # Not SummaryWriter: its thread dies of a full disk, and the next write then waits forever.
                self._board = EventsWriter(str(board / "events"))
                first = start_step + 1 if start_step else 0  # TensorBoard drops earlier events from this step on
                start = SessionLog(status=SessionLog.START)
                self._board.write_event(Event(wall_time=time.time(), step=first, session_log=start))
        evaluations = from_first(lambda: [line for line in lines if "val_top1" in line])
        top1.update({line["step"]: line["val_top1"] for line in evaluations})
        self.last: dict[str, Any] | None = evaluations[-1] if evaluations else None  # line of the last evaluation

    def write(self, step: int, epoch: float, values: dict[str, Any]) -> None:
        """Writes a line; values: {name: float, or a list over layers of lists over heads}."""
        line = {"step": step, "epoch": round(epoch, 4), **values}
        if "val_top1" in values:
            self.last, self.top1[step] = line, values["val_top1"]
        if self._directory is None:
            return
        with disk_errors(self._directory / "metrics.jsonl"):
            self._file.write(json.dumps(line) + "\n")
            points = [point for name, value in values.items() for point in _scalars(name, value)]
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in points])
            self._board.write_event(Event(wall_time=time.time(), step=step, summary=summary))
            self._board.flush()

    def close(self) -> None:
        """Closes both files; every line is already on the disk."""
        if self._directory:
            with contextlib.suppress(OSError):  # `write` has reported a full disk
                self._file.close()
                self._board.close()


def _scalars(name: str, value: Any) -> list[tuple[str, float]]:
    """[(tag, number)] for TensorBoard: the value; of layers and heads all values and each layer's mean."""
    if not isinstance(value, list):
        return [(name, value)]
    points = []
    for layer, heads in enumerate(value, start=1):
        points.append((f"{name}/layer_{layer}/mean", sum(heads) / len(heads)))
        points += [(f"{name}/layer_{layer}/head_{head}", each) for head, each in enumerate(heads, start=1)]
    return points
