"""The runs of a study on the disk: what became of each, whose turn it is, and one of them as a process.

DIR/study.json is the plan, DIR/runs/NAME the run directory of train.py with its output in output.log, and
in outcome.json what train.py itself cannot tell: seconds, its exit status, and why it failed. All state is
there, so any number of commands may work on one study, and any of them may be cut off.
"""

import contextlib
import dataclasses
import os
import re
import shlex
import signal
import subprocess
import sys
import time

from convit_jax.config import ROOT, compare_configs
from convit_jax.errors import UserError
from convit_jax.rundir import (
    DirectoryLocked,
    disk_errors,
    lock_directory,
    read_json,
    read_metrics,
    write_json,
)
from convit_jax.study.plan import FREE, identity


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a run so far.

    state: "done", "failed", "begun" or "to do". step: of the last line of its metrics.jsonl. last: top1, top5
    and loss at the end, {} before. best: the best top-1 of all evaluations. failure: its sentence.
    failed_at: in seconds since 1970.
    """

    state: str
    step: int = 0
    steps: int | None = None
    last: dict = dataclasses.field(default_factory=dict)
    best: float | None = None
    seconds: float = 0.0
    failure: str | None = None
    failed_at: float | None = None

    def share(self):
        """Of its steps, done."""
        return self.step / self.steps if self.steps else 0.0


def folder(output, run):
    """The run directory."""
    return output / "runs" / run.name


def outcome(output, run):
    """Read the Outcome of a run from its directory."""
    where = folder(output, run)
    lines = read_metrics(where / "metrics.jsonl")
    evaluations = [line for line in lines if "val_top1" in line]
    facts, ended = read_json(where / "run.json"), read_json(where / "outcome.json")
    steps = facts.get("steps")
    # Of the last line and the last checkpoint either may be there before the other.
    done = bool(evaluations) and evaluations[-1]["step"] == steps
    done = done and (ended.get("status") == 0 or (where / "checkpoints" / str(steps)).is_dir())
    failure = None if done else ended.get("failure")
    return Outcome(
        state="done" if done else "failed" if failure else "begun" if lines else "to do",
        step=lines[-1]["step"] if lines else 0,
        steps=steps,
        last={name: evaluations[-1][f"val_{name}"] for name in ("top1", "top5", "loss")} if done else {},
        best=max(line["val_top1"] for line in evaluations) if evaluations else None,
        seconds=ended.get("seconds", 0.0),
        failure=failure,
        failed_at=ended.get("at") if failure else None,
    )


def claim(output, plan):
    """Make the directory of a study, or take up the one of the same plan, which may have grown by some runs.

    Raises:
      UserError: it holds another plan, and what differs, or a run, or cannot be written.
    """
    if (output / "config.json").exists():
        raise UserError(
            f"{output} is the directory of a run of train.py, not of a study: give another --output."
        )
    with lock_directory(output, "study.lock", wait=True), disk_errors(output):
        (output / "runs").mkdir(exist_ok=True)
        saved = read_json(output / "study.json")
        different = _differences(plan, saved.get("runs", {}))
        if different:
            theirs = " ".join([saved["plan"], *saved["changes"]])
            more = f"; and {len(different) - 4} more" if different[4:] else ""
            raise UserError(
                f"{output} holds another plan, {theirs} ({'; '.join(different[:4])}{more}): give another "
                "--output, or the old plan to go on with it."
            )
        for run in plan.runs:
            config = read_json(folder(output, run) / "config.json")
            changed = compare_configs(identity(run.config), identity(config), FREE) if config else []
            if changed:
                raise UserError(
                    f"{folder(output, run)} holds a run with another config ({'; '.join(changed)}): "
                    "give another --output."
                )
        whole = {
            "plan": plan.source,
            "changes": plan.changes,
            "title": plan.title,
            "runs": {run.name: identity(run.config) for run in plan.runs},
        }
        write_json(output / "study.json", whole)


def _differences(plan, saved):
    """How a plan differs from the runs of a study.json, without those that are new; [] if it does not."""
    now = {run.name: run for run in plan.runs}
    fields = {}  # in the order in which they are met, each once
    for name in saved:
        if name in now:
            fields.update(dict.fromkeys(compare_configs(identity(now[name].config), saved[name], FREE)))
    gone = [name for name in saved if name not in now]
    more = f" and {len(gone) - 1} more" if gone[1:] else ""
    return [*fields, *([f"its run {gone[0]}{more} is not in this plan"] if gone else [])]


def train_command(run, output, python="python"):
    """The command of a run as a list."""
    return [python, os.path.relpath(ROOT / "train.py"), *run.flags, f"--workdir={folder(output, run)}"]


def take(output, run):
    """A handle that keeps a run for this command until it is closed, or None if another command has it."""
    try:
        ours = lock_directory(folder(output, run), "study.lock")
    except DirectoryLocked:
        return None
    try:
        lock_directory(folder(output, run)).release()  # a train.py that was started by hand
    except DirectoryLocked:
        ours.release()
        return None
    return ours


class Signals:
    """Context manager: SIGINT and SIGTERM go to the run under way, which saves itself; `number` is the first.

    The run is in a session of its own, so that Ctrl-C in the terminal reaches it once, from here: a second
    signal would make it stop without saving.
    """

    def __init__(self):
        self.number, self.process, self._kept = None, None, []

    def _handle(self, number, frame):
        self.number = self.number or number
        self._kept.append(number)
        self.forward()

    def forward(self):
        """Send the run, as soon as there is one, each signal that came, once."""
        with contextlib.suppress(IndexError):  # all is sent, maybe by a signal meanwhile
            while self.process is not None:
                self.process.send_signal(self._kept.pop(0))

    def __enter__(self):
        self._previous = {n: signal.signal(n, self._handle) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception):
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def train(run, output, ours, signals, show):
    """Start or continue a run as a process, and wait for it.

    Args:
      ours: what `take` returned; the process keeps it too, so that a run outlives a killed command unharmed.
      signals: Signals. show: called with each line that the run prints.

    Returns:
      Its Outcome, which is on the disk as well.
    """
    where = folder(output, run)
    before, began = read_json(where / "outcome.json").get("seconds", 0.0), time.monotonic()
    with disk_errors(where / "output.log"), (where / "output.log").open("a+", errors="replace") as log:
        log.write(f"$ {shlex.join(train_command(run, output))}\n")
        log.flush()
        start = log.tell()
        process = signals.process = subprocess.Popen(
            train_command(run, output, sys.executable),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        signals.forward()  # what came while it was being started
        said, unfinished = [], ""
        with (where / "output.log").open(errors="replace") as reading:
            reading.seek(start)
            while True:
                ended = process.poll() is not None
                *lines, unfinished = (unfinished + reading.read()).split("\n")
                said += filter(None, lines)
                for line in lines[-1:]:
                    show(line)
                if ended:
                    break
                time.sleep(0.2)
        signals.process = None
    failed = process.returncode != 0 and not signals.number
    record = {
        "seconds": round(before + time.monotonic() - began, 1),
        "status": process.returncode,
        "failure": _why(process.returncode, said) if failed else None,
        "at": time.time(),
    }
    with disk_errors(where / "outcome.json"):
        write_json(where / "outcome.json", record)
    return outcome(output, run)


def _why(code, said):
    """The sentence for a run that failed: its own, or that of a trace, or the signal's name."""
    if code < 0:
        hint = " (was the machine out of memory?)" if -code == signal.SIGKILL else ""
        return f"killed by {signal.Signals(-code).name}{hint}"
    own = [line.removeprefix("train.py: ") for line in said if line.startswith("train.py: ")]
    raised = [line for line in said if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return [*(own or raised or said or [f"exit status {code}"])][-1].strip()
