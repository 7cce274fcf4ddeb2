"""Run a study: train one run after another, then print the table.

    python -m convit_jax.study studies/digits.py:sample_efficiency --output=DIR [--config.epochs=5]

Finished runs are skipped, stopped ones continue, failed ones are tried again. The same command on another GPU
or machine that sees DIR shares the work. --config.FIELD=VALUE changes a field of all runs.
"""

import contextlib
import functools
import shlex
import signal
import sys
from collections import Counter
from pathlib import Path

from absl import flags
from tqdm import tqdm

from convit_jax.cli import launch
from convit_jax.errors import UserError
from convit_jax.progress import Progress
from convit_jax.rundir import DirectoryLocked, disk_errors, lock_directory
from convit_jax.study import runner
from convit_jax.study.figure import draw_study
from convit_jax.study.plan import Study, check_study, read_study
from convit_jax.study.table import write_tables


def _define_flags() -> None:
    flags.DEFINE_string("output", None, "Directory of the study; by default runs/NAME of the plan.")
    flags.DEFINE_bool("list", False, "Print the runs and their commands without running them.")


def main(arguments: list[str], changes: list[str]) -> int:
    """Runs what is left of a study; returns the exit status."""
    import jax

    if len(arguments) != 1:
        raise UserError("give one PLAN, as studies/digits.py:sample_efficiency.")
    study = read_study(arguments[0], changes)
    path, _, name = study.source.partition(":")
    output = Path(flags.FLAGS.output or f"runs/{Path(path).stem}_{name}".rstrip("_")).expanduser()
    if flags.FLAGS.list:
        for run in study.runs:
            print(f"# {run.name}\n{shlex.join(runner.train_command(run, output))}")
        return 0
    jax.config.update("jax_platforms", "cpu")  # the checks load a teacher; the GPU's memory is for the runs
    check_study(study)
    runner.claim_study(output, study)
    signals: list[int] = []  # that have arrived: the current run saves, and no other starts
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: signals.append(number))
    run_study(study, output, signals)
    states = Counter(found.state for found in write_results(study, output).values())
    print((output / "table.md").read_text())
    print(f"  results {output}")
    if left := states.total() - states["done"]:
        command = shlex.join(["python", "-m", "convit_jax.study", study.source, f"--output={output}", *study.changes])
        words = f"{left} of {states.total()} runs, {states['failed']} failed"
        print(f"  left    {words}; the same command continues:\n          {command}")
    return 128 + signals[0] if signals else int(states["failed"] > 0)


def run_study(study: Study, output: Path, signals: list[int]) -> None:
    """Trains until a signal arrives, or nothing is left but what other commands work on."""
    at_start = outcomes = write_results(study, output)
    counts, total = Counter(found.state for found in at_start.values()), len(study.runs)
    words = ", ".join(f"{counts[state]} {state}" for state in ("done", "begun", "failed", "to do") if counts[state])
    print(f"{study.title}\n{study.question}\n{total} runs in {output}: {words}", flush=True)
    progress = Progress("runs", total, every=2)  # no lines in a file but those of `say`
    progress.start(counts["done"])
    tried: set[str] = set()
    tried_before = -1
    while len(tried) > tried_before:  # again, for runs that other commands have left
        tried_before = len(tried)
        for number, run in enumerate(study.runs, 1):
            directory = runner.run_directory(output, run)
            with contextlib.suppress(DirectoryLocked), lock_directory(directory, runner.LOCK):
                with lock_directory(directory):  # train.py's own: it may go on after its command was killed
                    now = runner.read_outcome(directory)
                failed_elsewhere = now.state == "failed" and now != at_start[run.name]
                if signals or run.name in tried or now.state == "done" or failed_elsewhere:
                    continue
                tried.add(run.name)
                done = sum(found.state == "done" for found in outcomes.values())
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
        outcomes = {run.name: runner.read_outcome(runner.run_directory(output, run)) for run in study.runs}
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
