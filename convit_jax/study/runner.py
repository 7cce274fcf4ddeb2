"""The runs of a study on the disk, and one of them as a process.

DIR/runs/NAME is a run directory of train.py, with its output in output.log and in outcome.json what train.py
cannot know: seconds over all starts, exit status, why it failed. There is no other state, so several commands
can share a study, and each can be stopped at any time.
"""

import dataclasses
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from convit_jax.config import ROOT, may_change
from convit_jax.rundir import check_same_config, disk_errors, read_json, read_metrics, write_json
from convit_jax.study.plan import StudyRun

LOCK = "study.lock"  # of a study's directory while it is written, of a run while a command works on it


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run has reached so far."""

    state: str  # "done", "failed", "begun" or "to do"
    step: int = 0  # last logged
    steps: int | None = None  # length of the run, once it has begun
    last: dict[str, float] = dataclasses.field(default_factory=dict)  # top1, top5 and loss at the end, if done
    best: float | None = None  # top-1 of all evaluations, in per cent
    seconds: float = 0.0  # spent on it so far
    failure: str | None = None  # why it failed


def run_directory(output: Path, run: StudyRun) -> Path:
    """Returns the run directory of a run in the directory of its study."""
    return output / "runs" / run.name


def read_outcome(output: Path, run: StudyRun) -> Outcome:
    """Returns the outcome of a run; UserError if its directory has one with other numbers."""
    directory = run_directory(output, run)
    lines = read_metrics(directory / "metrics.jsonl")
    if lines:
        check_same_config(directory, run.config, may_change() - {"steps", "distill.teacher"}, "--output")
    evaluations = [line for line in lines if "val_top1" in line]
    steps = read_json(directory / "run.json").get("steps")
    ended = read_json(directory / "outcome.json")
    done = ended.get("status") == 0 and bool(evaluations) and evaluations[-1]["step"] == steps
    failure = None if done else ended.get("failure")
    return Outcome(
        state="done" if done else "failed" if failure else "begun" if lines else "to do",
        step=lines[-1]["step"] if lines else 0,
        steps=steps,
        last={name: evaluations[-1][f"val_{name}"] for name in ("top1", "top5", "loss")} if done else {},
        best=max((line["val_top1"] for line in evaluations), default=None),
        seconds=ended.get("seconds", 0.0),
        failure=failure,
    )


def train_command(run: StudyRun, output: Path) -> list[str]:
    """Returns the command of a run."""
    return ["python", os.path.relpath(ROOT / "train.py"), *run.flags, f"--workdir={run_directory(output, run)}"]


def run_training(run: StudyRun, output: Path, signals: list[int], show: Callable[[str], None]) -> None:
    """Starts or continues a run as a process, waits for it and writes outcome.json; the caller has locked it.

    Signals that arrive are passed on; the first makes train.py save. `show` gets the run and its last line.
    """
    directory, command, began = run_directory(output, run), train_command(run, output), time.monotonic()
    seconds = read_json(directory / "outcome.json").get("seconds", 0.0)
    log_path = directory / "output.log"
    with disk_errors(log_path), log_path.open("a") as log:
        log.write(f"$ {shlex.join(command)}\n")
        log.flush()
        start, passed_on = log.tell(), 0
        process = subprocess.Popen(
            [sys.executable, *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches it once, from here: twice would stop it without saving
        )
        while process.poll() is None:
            for number in signals[passed_on:]:
                process.send_signal(number)
                passed_on += 1
            show(f"{run.name}: {_read_end(log_path, start)[-1]}")
            time.sleep(0.2)
    failed = process.returncode != 0 and not signals
    record = {
        "seconds": round(seconds + time.monotonic() - began, 1),
        "status": process.returncode,
        "failure": _find_reason(process.returncode, _read_end(log_path, start)) if failed else None,
    }
    with disk_errors(directory / "outcome.json"):
        write_json(directory / "outcome.json", record)


def _read_end(path: Path, start: int) -> list[str]:
    """The last lines of a file, at most 64 KB and none before `start`; at least one, perhaps empty."""
    with path.open("rb") as file:
        file.seek(max(start, path.stat().st_size - 2**16))
        return [line for line in file.read().decode(errors="replace").splitlines() if line.strip()] or [""]


def _find_reason(status: int, lines: list[str]) -> str:
    """Why a run failed: its own message, the last line of a traceback, or the name of the signal."""
    if status < 0:
        hint = " (was the machine out of memory?)" if -status == signal.SIGKILL else ""
        return f"killed by {signal.Signals(-status).name}{hint}"
    own = [line for line in lines if line.startswith("train.py: ")]
    raised = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (own or raised or lines)[-1].removeprefix("train.py: ").strip() or f"exit status {status}"
