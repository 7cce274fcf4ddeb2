"""Run a study: the trainings of a plan one after another, then their table and figure.

    python -m convit_jax.study studies/digits.py:sample_efficiency --output=DIR [--config.epochs=5]

What is done is skipped, what was cut off continues, what failed is tried again. The same command on
another GPU or machine that sees DIR shares the work. --config.FIELD=VALUE changes a field in all runs.
"""

import functools
import shlex
import shutil
import sys
import time
from pathlib import Path

import jax
from absl import flags
from tqdm import tqdm

from convit_jax.cli import launch
from convit_jax.errors import UserError
from convit_jax.rundir import disk_errors, lock_directory
from convit_jax.study.figure import draw
from convit_jax.study.plan import check, read_plan
from convit_jax.study.runner import Signals, claim, folder, outcome, take, train, train_command
from convit_jax.study.table import write_tables

SAVED = "interrupted; what was done stays, the same command continues."


def define():
    flags.DEFINE_string("output", None, "Directory of the study; by default runs/NAME of the plan.")
    flags.DEFINE_bool("list", False, "Print the runs and their commands, and run nothing.")


def main(arguments, changes):
    """Run what of the plan is left to do; returns the exit status."""
    if len(arguments) != 1:
        raise UserError("give one PLAN, as studies/digits.py:sample_efficiency.")
    plan = read_plan(arguments[0], changes)
    path, _, name = plan.source.partition(":")
    output = flags.FLAGS.output or f"runs/{'_'.join(filter(None, (Path(path).stem, name)))}"
    output = Path(output).expanduser()
    if flags.FLAGS.list:
        for run in plan.runs:
            print(f"# {run.name}\n{shlex.join(train_command(run, output))}")
        return 0
    jax.config.update("jax_platforms", "cpu")  # to look at a teacher: a GPU's memory is for the runs
    work = check(plan)
    claim(output, plan)
    with Signals() as signals:
        with_others = study(plan, output, signals, work)
        outcomes = write(plan, output)
    return conclude(plan, output, outcomes, with_others, signals.number)


def study(plan, output, signals, work):
    """Train run after run, until none is left but what other commands have, or a signal came.

    work: what `check` returned. Returns how many runs other commands have.
    """
    outcomes = {run.name: outcome(output, run) for run in plan.runs}
    failed_before = {name: found.failed_at for name, found in outcomes.items()}
    states = [found.state for found in outcomes.values()]
    counts = {state: states.count(state) for state in ("done", "begun", "failed", "to do")}
    said = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    print(f"{plan.title}\n{plan.question}\n{len(plan.runs)} runs in {output}: {said}", flush=True)
    tried, seconds, worked = set(), 0.0, 0.0

    def may_try(run, now):
        """Whether it is to be done; what another command has seen fail since we started is not."""
        again = now.failed_at in (None, failed_before[run.name]) and run.name not in tried
        return again and now.state != "done"

    while True:
        run, before, ours, others = next_run(plan, output, may_try)
        if run is None or signals.number:
            return others
        tried.add(run.name)
        live = Live(f"[{plan.runs.index(run) + 1}/{len(plan.runs)}] {run.name}")
        began = time.monotonic()
        try:
            now = train(run, output, ours, signals, live.show)
        finally:
            ours.release()
        took = time.monotonic() - began
        seconds, worked = seconds + took, worked + work[run.name] * (now.share() - before.share())
        if now.state == "done":
            text = f"top-1 {now.last['top1']:.2f} in {tqdm.format_interval(took)}"
            rest = [(other, outcome(output, other)) for other in plan.runs]
            left = sum(work[each.name] * (1 - found.share()) for each, found in rest if may_try(each, found))
            if left and worked:
                text += f", about {tqdm.format_interval(left / worked * seconds / (1 + others))} left"
            live.end(text)
        elif now.failure:
            live.end(f"failed: {now.failure} (its output: {folder(output, run)}/output.log)")
        else:
            live.end("stopped; the same command continues it")
        if not signals.number:
            write(plan, output)


def next_run(plan, output, may_try):
    """The next run that nobody has, as (run, its Outcome, what `take` returned, how many others have).

    may_try: of a run and its Outcome, whether it is wanted. The first three are None if there is none.
    """
    others = 0
    for run in plan.runs:
        if not may_try(run, outcome(output, run)):
            continue
        ours = take(output, run)
        if ours is None:
            others += 1
            continue
        now = outcome(output, run)  # another command may have ended it since
        if may_try(run, now):
            return run, now, ours, others
        ours.release()
    return None, None, None, others


def write(plan, output):
    """Write the tables and draw the figure of what is there; returns {name of the run: Outcome}."""
    with lock_directory(output, "study.lock", wait=True), disk_errors(output):
        outcomes = {run.name: outcome(output, run) for run in plan.runs}
        write_tables(plan, outcomes, output)
        try:
            draw(plan, outcomes, output)
        except Exception as error:  # of the plotting library: no reason to end a study of hours
            print(f"the figure cannot be drawn, the tables are there: {error}", flush=True)
    return outcomes


def conclude(plan, output, outcomes, with_others, signal_number):
    """Print what came out and what is left to do; returns the exit status."""
    print((output / "table.md").read_text().rstrip())
    print(f"\n  table   {output}/table.md, table.csv")
    if (output / "figure.png").exists():
        print(f"  figure  {output}/figure.pdf, figure.png")
    states = [found.state for found in outcomes.values()]
    left, failed = len(states) - states.count("done"), states.count("failed")
    if not left:
        return 0
    if signal_number or left > with_others:
        command = ["python", "-m", "convit_jax.study", plan.source, f"--output={output}", *plan.changes]
        said = f"{left} of {len(states)} runs" + (f", {failed} failed" if failed else "")
        print(f"  left    {said}; the same command goes on with them:\n          {shlex.join(command)}")
        return 128 + signal_number if signal_number else 1
    print(f"  left    {left} of {len(states)} runs, which other commands are at")
    return 0


class Live:
    """The line of the run under way: redrawn in a terminal; in a file only its end."""

    def __init__(self, head):
        self.head, self.live = head, sys.stdout.isatty()
        self.show("starting")

    def show(self, text):
        """What the run is doing now."""
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            print("\r\x1b[K" + f"{self.head}: {text}"[:width], end="", flush=True)

    def end(self, text):
        """What became of it, a line that stays."""
        print(("\r\x1b[K" if self.live else "") + f"{self.head}: {text}", flush=True)


if __name__ == "__main__":
    changes = [argument for argument in sys.argv[1:] if argument.lstrip("-").startswith("config.")]
    sys.argv = [argument for argument in sys.argv if argument not in changes]
    launch(
        "study",
        functools.partial(main, changes=changes),
        define=define,
        arguments="PLAN",
        interrupted=SAVED,
    )
