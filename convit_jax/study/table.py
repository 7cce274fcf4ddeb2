"""The tables of a study: table.csv has a line per run, table.md the means over seeds.

A cell of table.md is mean ± sample standard deviation over seeds, then the paper's number in brackets.
"""

import csv
import math
import statistics
from collections.abc import Mapping
from pathlib import Path

from convit_jax.rundir import atomic_write
from convit_jax.study.plan import METRICS, Name, Study
from convit_jax.study.runner import Outcome

Cells = Mapping[tuple[Name, Name], list[float]]  # the numbers of each row and column that has runs
Estimate = tuple[float, float | None]  # a value and its spread or error; None of fewer than two seeds


def collect_cells(study: Study, outcomes: Mapping[str, Outcome], metric: str) -> tuple[Cells, Cells]:
    """Returns a metric of each seed that is done, and the paper's: one number or none."""
    ours: Cells = {(run.row, run.column): [] for run in study.runs}
    paper = {(run.row, run.column): [run.paper[metric]] if metric in run.paper else [] for run in study.runs}
    for run in study.runs:
        if last := outcomes[run.name].last:
            ours[run.row, run.column].append(last[metric])
    return ours, paper


def mean_over_seeds(study: Study, cells: Cells, row: Name, column: Name) -> Estimate | None:
    """Returns the mean and the sample standard deviation of a cell; None without numbers."""
    numbers = cells.get((row, column))
    if not numbers:
        return None
    return statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None


def gap_to_baseline(study: Study, cells: Cells, row: Name, column: Name) -> Estimate | None:
    """Compares the mean m of a cell with the baseline's m0 in the same column, as the paper's Table 2 does.

    Returns:
      ((m - m0) / m0, its standard error), both in per cent. With the standard errors s and s0 of the means
      the latter is sqrt(s^2 + (m / m0)^2 s0^2) / m0. None without numbers, and for the baseline itself.
    """
    numbers, baseline = cells.get((row, column), []), cells.get((study.baseline, column), [])
    if row == study.baseline or not numbers or not any(baseline):
        return None
    mean, mean_0 = statistics.fmean(numbers), statistics.fmean(baseline)
    gap = 100 * (mean - mean_0) / mean_0
    if len(numbers) < 2 or len(baseline) < 2:
        return gap, None
    of_mean, of_mean_0 = (statistics.stdev(each) / math.sqrt(len(each)) for each in (numbers, baseline))
    return gap, 100 * math.hypot(of_mean, mean / mean_0 * of_mean_0) / mean_0


def write_tables(study: Study, outcomes: Mapping[str, Outcome], output: Path) -> None:
    """Writes table.csv and table.md into the directory of the study."""
    with atomic_write(output / "table.csv") as file:
        writer = csv.writer(file, lineterminator="\n")
        file.write("run,row,column,seed,state,step,steps,top1,top5,loss,best_top1,seconds,failure\n")
        for run in study.runs:
            found = outcomes[run.name]
            last = [found.last.get(metric) for metric in METRICS]
            facts = (run.name, run.row, run.column, run.seed, found.state, found.step, found.steps)
            writer.writerow([*facts, *last, found.best, found.seconds, found.failure])
    with atomic_write(output / "table.md") as file:
        file.write(format_markdown(study, outcomes))


def format_markdown(study: Study, outcomes: Mapping[str, Outcome]) -> str:
    """Returns the text of table.md: a table per metric, failures, what is left, the command."""
    parts = [f"# {study.title}", study.question]
    for metric in study.metrics:
        caption, (head, *lines) = make_table(study, outcomes, metric)
        lines = [head, ["---"] * len(head), *lines]
        parts += [caption, "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    failed = [f"- {name}: {found.failure}" for name, found in outcomes.items() if found.state == "failed"]
    if failed:
        parts.append("Failed:\n\n" + "\n".join(failed))
    left = sum(found.state in ("begun", "to do") for found in outcomes.values())
    if left:
        parts.append(f"Not done yet: {left} of {len(outcomes)} runs.")
    command = " ".join(["python -m convit_jax.study", study.source, *study.changes])
    return "\n\n".join([*parts, f"`{command}`"]) + "\n"


def make_table(study: Study, outcomes: Mapping[str, Outcome], metric: str) -> tuple[str, list[list[str]]]:
    """Returns the caption and the texts of a table: a head, a line per row, a line per gap to the baseline."""
    ours, paper = collect_cells(study, outcomes, metric)
    rows, columns, seeds = study.row_names(), study.column_names(), sorted({run.seed for run in study.runs})

    def format_mean(row: Name, column: Name) -> str:
        """'57.41 ± 0.32 (57.4)', with the number of seeds if some are missing."""
        if (row, column) not in ours:
            return ""
        count = len(ours[row, column])
        text = _format_estimate(mean_over_seeds(study, ours, row, column), "{:.2f}")
        text += f" [n = {count}]" if 0 < count < len(seeds) else ""
        return text + "".join(f" ({number})" for number in paper[row, column])

    def format_gap(row: Name, column: Name) -> str:
        """'+24.3% ± 1.1% (+24.1%)'."""
        theirs = gap_to_baseline(study, paper, row, column)
        text = _format_estimate(gap_to_baseline(study, ours, row, column), "{:+.1f}%")
        return text + (f" ({theirs[0]:+.1f}%)" if theirs else "")

    corner = f"{study.rows} \\ {study.columns}" if study.columns else study.rows
    lines = [[corner, *(study.column_label(column) if study.columns else METRICS[metric] for column in columns)]]
    lines += [[study.row_label(row), *(format_mean(row, column) for column in columns)] for row in rows]
    several = len(seeds) > 1
    over = f"mean ± standard deviation over {len(seeds)} seeds" if several else f"seed {seeds[0]}"
    caption = f"{METRICS[metric]} on the test images at the end of training, {over}"
    caption += "; in brackets the paper's" if any(paper.values()) else ""
    if study.baseline is not None:
        caption += "; relative gap of the means" + (" ± its standard error" if several else "")
        over = f" over {study.row_label(study.baseline)}"
        others = [row for row in rows if row != study.baseline]
        lines += [[study.row_label(row) + over, *(format_gap(row, column) for column in columns)] for row in others]
    return f"{caption}.", lines


def _format_estimate(estimate: Estimate | None, number: str) -> str:
    """A value and its error in a format such as "{:+.1f}%", the error without a sign."""
    if estimate is None:
        return "-"
    value, error = estimate
    return number.format(value) + ("" if error is None else f" ± {number.replace('+', '').format(error)}")
