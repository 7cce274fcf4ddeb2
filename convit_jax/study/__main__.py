"""Run a study: train one run after another, then print the table.

    python -m convit_jax.study studies/digits.py:sample_efficiency --output=DIR [--config.epochs=5]

Finished runs are skipped, stopped ones continue, failed ones are tried again. The same command on another GPU
or machine that sees DIR shares the work. --config.FIELD=VALUE changes a field of all runs.
"""

import functools
import shlex
import sys
from collections import Counter
from pathlib import Path

import jax
from absl import flags
from tqdm import tqdm

from convit_jax.cli import launch
from convit_jax.errors import UserError
from convit_jax.progress import Progress
from convit_jax.rundir import disk_errors, lock_directory
from convit_jax.study.figure import draw_study
from convit_jax.study.plan import Study, StudyRun, check_study, read_study
from convit_jax.study.runner import (
    LOCK,
    Outcome,
    claim_study,
    collect_signals,
    lock_run,
    read_outcome,
    read_outcomes,
    run_directory,
    run_training,
    train_command,
)
from convit_jax.study.table import write_tables


def _define_flags() -> None:
    flags.DEFINE_string("output", None, "Directory of the study; by default runs/NAME of the plan.")
    flags.DEFINE_bool("list", False, "Print the runs and their commands without running them.")


def main(arguments: list[str], changes: list[str]) -> int:
    """Runs what is left of a study; returns the exit status."""
    if len(arguments) != 1:
        raise UserError("give one PLAN, as studies/digits.py:sample_efficiency.")
    study = read_study(arguments[0], changes)
    path, _, name = study.source.partition(":")
    default = f"runs/{'_'.join(filter(None, (Path(path).stem, name)))}"
    output = Path(flags.FLAGS.output or default).expanduser()
    if flags.FLAGS.list:
        for run in study.runs:
            print(f"# {run.name}\n{shlex.join(train_command(run, output))}")
        return 0
    jax.config.update("jax_platforms", "cpu")  # the checks load a teacher; the GPU's memory is for the runs
    check_study(study)
    claim_study(output, study)
    with collect_signals() as signals:
        shared = run_study(study, output, signals)
        outcomes = write_results(study, output)
    print((output / "table.md").read_text())
    files = [name for name in ("table.md", "table.csv", "figure.pdf", "figure.png") if (output / name).exists()]
    print(f"  results {output}/{', '.join(files)}")
    states = [found.state for found in outcomes.values()]
    left = len(states) - states.count("done")
    if left and not signals and left <= shared:
        print(f"  left    {left} of {len(states)} runs, in other commands")
    elif left:
        command = shlex.join(["python", "-m", "convit_jax.study", study.source, f"--output={output}", *study.changes])
        words = f"{left} of {len(states)} runs, {states.count('failed')} failed"
        print(f"  left    {words}; the same command continues:\n          {command}")
        return 128 + signals[0] if signals else 1
    return 0


def run_study(study: Study, output: Path, signals: list[int]) -> int:
    """Trains until nothing is left or a signal arrives; returns how many runs other commands work on."""
    at_start, total = read_outcomes(output, study), len(study.runs)
    counts = Counter(found.state for found in at_start.values())
    words = ", ".join(f"{counts[state]} {state}" for state in ("done", "begun", "failed", "to do") if counts[state])
    print(f"{study.title}\n{study.question}\n{total} runs in {output}: {words}", flush=True)
    progress = Progress("runs", total, every=2)  # no lines in a file but those of `say`
    progress.start(counts["done"])
    tried: set[str] = set()

    def is_left(run: StudyRun) -> bool:
        """Whether to train a run; not if it was tried here or has failed in another command meanwhile."""
        now = read_outcome(run_directory(output, run))
        failed_since = now.state == "failed" and now.ended_at != at_start[run.name].ended_at
        return run.name not in tried and now.state != "done" and not failed_since

    def train(number: int, run: StudyRun) -> None:
        done = sum(found.state == "done" for found in read_outcomes(output, study).values())
        now = run_training(run, output, signals, lambda line: progress.update(done, f"{run.name}: {line}"))
        write_results(study, output)
        text = "stopped; the same command continues it"
        if now.state == "done":
            text = f"top-1 {now.last['top1']:.2f} in {tqdm.format_interval(now.seconds)}"
        elif now.failure:
            text = f"failed: {now.failure} (its output: {run_directory(output, run)}/output.log)"
        progress.say(f"[{number}/{total}] {run.name}: {text}")

    trained, shared = True, 0
    while trained and not signals:  # again, for runs that other commands have left
        trained, shared = False, 0
        for number, run in enumerate(study.runs, 1):
            if signals or not is_left(run):
                continue
            with lock_run(output, run) as locked:
                shared += not locked
                if locked and is_left(run):  # another command may just have finished it
                    tried.add(run.name)
                    train(number, run)
                    trained = True
    progress.close()
    return shared


def write_results(study: Study, output: Path) -> dict[str, Outcome]:
    """Writes the tables and the figure of what there is; returns the outcome of each run by name."""
    with lock_directory(output, LOCK, wait=True), disk_errors(output):
        outcomes = read_outcomes(output, study)
        write_tables(study, outcomes, output)
        try:
            draw_study(study, outcomes, output)
        except Exception as error:  # whatever Matplotlib raises must not end a study that runs for hours
            print(f"cannot draw the figure ({error}); the tables are complete.", flush=True)
    return outcomes


if __name__ == "__main__":
    changes = [argument for argument in sys.argv[1:] if argument.lstrip("-").startswith("config.")]
    sys.argv = [argument for argument in sys.argv if argument not in changes]
    launch(
        "study",
        functools.partial(main, changes=changes),
        define=_define_flags,
        arguments="PLAN",
        interrupted="interrupted; the same command continues.",
    )
