"""Run a study: train one run after another, then print the table.

    python -m convit_jax.study studies/digits.py:sample_efficiency --output=DIR [--seeds=0,1] [--config.epochs=5]

Finished runs are skipped, stopped ones continue, failed ones are tried again. The same command on another GPU
or machine that sees DIR shares the work. --rows, --columns and --seeds train a part of the study.
--config.FIELD=VALUE changes a field of all runs.
"""

import contextlib
import functools
import shlex
import signal
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
from absl import flags
from tqdm import tqdm

from convit_jax.cli import launch, source_name
from convit_jax.progress import Progress
from convit_jax.rundir import DirectoryLocked, disk_errors, lock_directory
from convit_jax.study import runner
from convit_jax.study.figure import draw_study
from convit_jax.study.plan import Study, StudyRun, check_runs, read_study, select_runs
from convit_jax.study.table import write_tables


def _define_flags() -> None:
    flags.DEFINE_string("output", None, "Directory of the study; by default runs/NAME of the plan.")
    flags.DEFINE_bool("list", False, "Print the runs and their commands without running them.")
    for name in ("rows", "columns", "seeds"):
        flags.DEFINE_list(name, None, f"Train only these {name} of the plan; the tables have all.")


def main(arguments: list[str], changes: list[str]) -> int:
    """Runs what is left of a study; returns the exit status."""
    values = flags.FLAGS
    study = read_study(arguments[0], changes)
    runs = select_runs(study, row=values.rows, column=values.columns, seed=values.seeds)
    output = Path(values.output or f"runs/{source_name(study.source)}").expanduser()
    if values.list:
        for run in runs:
            print(f"# {run.name}\n{shlex.join(runner.train_command(run, output))}")
        return 0
    jax.config.update("jax_platforms", "cpu")  # the checks load a teacher; the GPU's memory is for the runs
    check_runs(runs)
    signals: list[int] = []  # that have arrived: the current run saves, and no other starts
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: signals.append(number))
    run_study(study, runs, output, signals)
    states = count_states(runs, write_results(study, output))
    print((output / "table.md").read_text())
    print(f"  results {output}")
    if left := len(runs) - states["done"]:
        print(f"  left    {left} of {len(runs)} runs, {states['failed']} failed; the same command continues")
    return 128 + signals[0] if signals else int(states["failed"] > 0)


def count_states(runs: Sequence[StudyRun], outcomes: Mapping[str, runner.Outcome]) -> Counter[str]:
    """Returns how many of the runs are done, begun, failed and to do."""
    return Counter(outcomes[run.name].state for run in runs)


def run_study(study: Study, runs: Sequence[StudyRun], output: Path, signals: list[int]) -> None:
    """Trains these runs until a signal arrives, or nothing is left but what other commands work on."""
    at_start = outcomes = write_results(study, output)
    counts, total = count_states(runs, at_start), len(runs)
    words = ", ".join(f"{counts[state]} {state}" for state in ("done", "begun", "failed", "to do") if counts[state])
    print(f"{study.title}\n{study.question}\nruns in {output}: {words}", flush=True)
    progress = Progress("runs", total, every=2)  # no lines in a file but those of `say`
    progress.start(counts["done"])
    tried: set[str] = set()
    tried_before = -1
    while len(tried) > tried_before:  # again, for runs that other commands have left
        tried_before = len(tried)
        for number, run in enumerate(runs, 1):
            directory = runner.run_directory(output, run)
            with contextlib.suppress(DirectoryLocked), lock_directory(directory, runner.LOCK):
                with lock_directory(directory):  # train.py's own: it may go on after its command was killed
                    now = runner.read_outcome(output, run)
                failed_elsewhere = now.state == "failed" and now != at_start[run.name]
                if signals or run.name in tried or now.state == "done" or failed_elsewhere:
                    continue
                tried.add(run.name)
                done = count_states(runs, outcomes)["done"]
                runner.run_training(run, output, signals, functools.partial(progress.update, done))
                outcomes = write_results(study, output)
                now = outcomes[run.name]
                text = "stopped; the same command continues it"
                if now.state == "done":
                    text = f"top-1 {now.last['top1']:.2f} in {tqdm.format_interval(now.seconds)}"
                elif now.failure:
                    text = f"failed: {now.failure} (its output: {directory}/output.log)"
                progress.say(f"[{number}/{total}] {run.name}: {text}")
    progress.close()


def write_results(study: Study, output: Path) -> dict[str, runner.Outcome]:
    """Writes the tables and the figure of what there is; returns the outcome of each run by name."""
    with lock_directory(output, runner.LOCK, wait=True), disk_errors(output):
        outcomes = {run.name: runner.read_outcome(output, run) for run in study.runs}
        write_tables(study, outcomes, output)
        try:
            draw_study(study, outcomes, output)
        except Exception as error:  # whatever Matplotlib raises must not end a study that runs for hours
            print(f"cannot draw the figure ({error}); the tables are complete.", flush=True)
    return outcomes


if __name__ == "__main__":
    changes = [argument for argument in sys.argv[1:] if argument.lstrip("-").startswith("config.")]
    sys.argv = [argument for argument in sys.argv if argument not in changes]
    launch("study", functools.partial(main, changes=changes), define=_define_flags, arguments="PLAN")
