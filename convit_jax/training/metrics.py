"""Where numbers go: metrics.jsonl, TensorBoard and the progress line."""

import contextlib
import json
import math
import os
import shutil
import sys
import time

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from convit_jax.rundir import atomic_write, disk_errors, read_metrics

SPEEDS = ("images_per_second", "data_wait", "mfu")  # of a line of metrics.jsonl: what the clock decides


class Evaluations:
    """The evaluations of a run: all that those of several processes keep that write no log.

    top1: a dict that gets {step: val_top1} of each. lines: theirs, in the log. last: the latest one, or None.
    """

    def __init__(self, top1):
        self.top1, self.lines = top1, []

    @property
    def last(self):
        return self.lines[-1] if self.lines else None

    def recall(self, lines):
        """Start from these lines of a log, of which those of evaluations matter."""
        self.lines = [line for line in lines if "val_top1" in line]
        self.top1.update({line["step"]: line["val_top1"] for line in self.lines})

    def write(self, step, epoch, values):
        """One line for a step; values is {name: float, or [layers][heads] of them}."""
        line = {"step": step, "epoch": round(epoch, 4), **values}
        if "val_top1" in values:
            self.lines.append(line)
            self.top1[step] = values["val_top1"]
        return line

    def close(self):
        """Nothing is open."""


class MetricsLog(Evaluations):
    """DIR/metrics.jsonl and DIR/tensorboard.

    Lines after start_step, of a run cut off, are dropped, and all if the run starts anew at step 0.

    Raises:
      UserError: the disk is full.
    """

    def __init__(self, directory, start_step, top1):
        self.path = directory / "metrics.jsonl"
        kept = [line for line in read_metrics(self.path) if start_step and line["step"] <= start_step]
        super().__init__(top1)
        self.recall(kept)
        with disk_errors(self.path):
            with atomic_write(self.path) as file:
                file.write("".join(json.dumps(line) + "\n" for line in kept))
            (directory / "tensorboard").mkdir(exist_ok=True)
            self.file = self.path.open("a", buffering=1)
            # The writer below SummaryWriter: that one's thread would die of a full disk and block us.
            self.board = EventsWriter(str(directory / "tensorboard" / "events"))
            first = start_step + 1 if start_step else 0  # what an earlier start wrote from here on is void
            self._event(step=first, session_log=SessionLog(status=SessionLog.START))

    def _event(self, **fields):
        self.board.write_event(Event(wall_time=time.time(), **fields))

    def write(self, step, epoch, values):
        """One line for a step; values is {name: float, or [layers][heads] of them}."""
        line = super().write(step, epoch, values)
        with disk_errors(self.path):
            self.file.write(json.dumps(line) + "\n")
            points = [point for name, value in values.items() for point in scalars(name, value)]
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in points])
            self._event(step=step, summary=summary)
            self.board.flush()

    def close(self):
        """Close both files; what was written is already there."""
        with contextlib.suppress(OSError):  # a full disk has been said before
            self.file.close()
            self.board.close()


def scalars(name, value):
    """[(tag, number)] of a value for TensorBoard: itself; of [layers][heads] all, and each layer's mean."""
    if not isinstance(value, list):
        return [(name, value)]
    points = []
    for layer, heads in enumerate(value, start=1):
        points.append((f"{name}/layer_{layer}/mean", sum(heads) / len(heads)))
        points += [(f"{name}/layer_{layer}/head_{head}", each) for head, each in enumerate(heads, start=1)]
    return points


class Clock:
    """Images per second, and the share of time in which the host waited for data, of a window of steps."""

    def __init__(self):
        self.restart()

    def restart(self):
        """Begin a window now."""
        self._since, self._waited, self._images = time.monotonic(), 0.0, 0

    @contextlib.contextmanager
    def waiting(self):
        """Time spent inside counts as waiting for data."""
        began = time.monotonic()
        yield
        self._waited += time.monotonic() - began

    @contextlib.contextmanager
    def paused(self):
        """Time spent inside does not count at all."""
        began = time.monotonic()
        yield
        self._since += time.monotonic() - began

    def count(self, images):
        """The device has done so many more images."""
        self._images += images

    def read(self):
        """(images per second, share of waiting) of the window, and begin the next."""
        seconds = max(time.monotonic() - self._since, 1e-9)
        rates = self._images / seconds, self._waited / seconds
        self.restart()
        return rates


class Progress:
    """The line that says how training goes: a live bar in a terminal, plain lines in a file."""

    def __init__(self, total_steps, start_step, stream=None):
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty()
        self.total, self.start = total_steps, start_step
        self.since, self.drawn = time.monotonic(), False

    def first_step(self, seconds):
        """The first step is done; time is counted from here, without its compilation."""
        self.say(f"First step after {seconds:.1f} s, compilation included")
        self.start, self.since = self.start + 1, time.monotonic()

    def update(self, step, epoch, values):
        """Show a step.

        values: train_loss, train_top1, lr, images_per_second, data_wait (a share), and where the device's
        peak is known mfu (a share of it).
        """
        left = (time.monotonic() - self.since) / max(step - self.start, 1) * (self.total - step)
        parts = {
            "step": f"step {step}/{self.total}",
            "epoch": f"epoch {epoch:.1f}",
            "loss": f"loss {values['train_loss']:.4f}",
            "top-1": f"top-1 {values['train_top1']:.1f}",
            "lr": f"lr {values['lr']:.2e}",
            "rate": f"{values['images_per_second']:.0f} img/s",
            "mfu": f"MFU {values['mfu']:.0%}" if "mfu" in values else "",
            "data": f"data {values['data_wait']:.0%}",
            "left": f"left {duration(left)}",
        }
        parts = {name: part for name, part in parts.items() if part}
        if not self.live:
            self.say("  ".join(parts.values()))
            return
        width = shutil.get_terminal_size().columns - 1
        for spare in ("lr", "epoch", "mfu", "data", "rate"):  # what a narrow terminal can do without
            if len("  ".join(parts.values())) > width:
                parts.pop(spare, None)
        line = "  ".join(parts.values())
        bar = min(24, width - len(line) - 3)
        done = math.floor(bar * step / self.total)
        text = f"[{'#' * done}{'.' * (bar - done)}] {line}" if bar >= 8 else line
        print("\r\x1b[K" + text[:width], end="", file=self.stream, flush=True)
        self.drawn = True

    def evaluated(self, step, epoch, values):
        """Show an evaluation; values: {"val_top1": per cent, ...}."""
        shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        self.say(f"step {step}/{self.total}  epoch {epoch:.1f}  {shown}")

    def finished(self, last, workdir, curves):
        """Say what came out, where it is, and what to do next; last: the line of the last evaluation."""
        python = os.path.relpath(sys.executable)
        self.say(
            f"Done: top-1 {last['val_top1']:.2f}  top-5 {last['val_top5']:.2f}  loss {last['val_loss']:.4f}\n"
            f"  checkpoints  {workdir}/checkpoints (latest and best)\n"
            f"  curves       {curves}\n"
            f"  TensorBoard  tensorboard --logdir={workdir}/tensorboard (after pip install tensorboard)\n"
            f"  next         your own images: {python} train.py --config=configs/convit_ti.py "
            "--config.init_from=convit_tiny --config.data.name=folder --config.data.dir=FOLDER "
            "with FOLDER/train/CLASS/*.jpg and FOLDER/val/CLASS/*.jpg"
        )

    def say(self, text):
        """A line that stays."""
        print(("\r\x1b[K" if self.drawn else "") + text, file=self.stream, flush=True)
        self.drawn = False


def duration(seconds):
    """'1:02:03' or '2:03'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
