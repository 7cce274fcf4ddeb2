"""The tables of a study: table.csv has a line per run, table.md the means over seeds.

A cell of table.md is mean ± sample standard deviation over seeds, then the paper's number in brackets.
"""

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from convit_jax.rundir import atomic_write
from convit_jax.study.plan import METRICS, Name, Study
from convit_jax.study.runner import Outcome

Cells = dict[tuple[Name, Name], list[float]]
Estimate = tuple[float, float | None]  # a value and its spread or error; None of fewer than two seeds


def collect_cells(study: Study, outcomes: Mapping[str, Outcome], metric: str) -> Cells:
    """Returns {(row, column): the metric of each seed that is done}."""
    cells: Cells = {(run.row, run.column): [] for run in study.runs}
    for run in study.runs:
        if outcomes[run.name].state == "done":
            cells[run.row, run.column].append(outcomes[run.name].last[metric])
    return cells


def mean_over_seeds(numbers: Sequence[float]) -> Estimate | None:
    """Returns the mean and the sample standard deviation; None without numbers."""
    if not numbers:
        return None
    return statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None


def relative_gap(numbers: Sequence[float], baseline: Sequence[float]) -> Estimate | None:
    """Compares two means m and m0 as the paper's Table 2 does.

    Returns:
      ((m - m0) / m0, its standard error), both in per cent. With the standard errors s and s0 of the means
      the latter is sqrt(s^2 + (m / m0)^2 s0^2) / m0. None without numbers.
    """
    if not numbers or not any(baseline):
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
    parts += [_format_table(study, outcomes, metric) for metric in study.metrics]
    failed = [f"- {name}: {found.failure}" for name, found in outcomes.items() if found.state == "failed"]
    if failed:
        parts.append("Failed:\n\n" + "\n".join(failed))
    left = sum(found.state in ("begun", "to do") for found in outcomes.values())
    if left:
        parts.append(f"Not done yet: {left} of {len(outcomes)} runs.")
    command = " ".join(["python -m convit_jax.study", study.source, *study.changes])
    return "\n\n".join([*parts, f"`{command}`"]) + "\n"


def _format_table(study: Study, outcomes: Mapping[str, Outcome], metric: str) -> str:
    """One metric: a line per row, and a line per gap between a row and the baseline."""
    cells, columns = collect_cells(study, outcomes, metric), study.column_names()
    paper: Cells = {cell: [found[metric]] for cell, found in study.paper.items() if metric in found}
    seeds = sorted({run.seed for run in study.runs})

    def format_cell(cell: tuple[Name, Name]) -> str:
        """'57.41 ± 0.32 (57.4)', with the number of seeds if some are missing."""
        numbers = cells.get(cell)
        if numbers is None:
            return ""
        text = _format_estimate(mean_over_seeds(numbers), "{:.2f}")
        text += f" [n = {len(numbers)}]" if 0 < len(numbers) < len(seeds) else ""
        return f"{text} ({paper[cell][0]})" if cell in paper else text

    def format_gap(row: Name, column: Name) -> str:
        """'+24.3% ± 1.1% (+24.1%)'."""
        ours, theirs = (
            relative_gap(source.get((row, column), []), source.get((study.baseline, column), []))
            for source in (cells, paper)
        )
        return _format_estimate(ours, "{:+.1f}%") + (f" ({theirs[0]:+.1f}%)" if theirs else "")

    corner = f"{study.rows} \\ {study.columns}" if study.columns else study.rows
    heads = [study.column_label(column) if study.columns else METRICS[metric] for column in columns]
    lines = [[corner, *heads], ["---"] * (1 + len(heads))]
    for row in study.row_names():
        lines.append([study.row_label(row), *(format_cell((row, column)) for column in columns)])
    for row in study.row_names() if study.baseline is not None else ():
        if row != study.baseline:
            label = f"{study.row_label(row)} over {study.row_label(study.baseline)}"
            lines.append([label, *(format_gap(row, column) for column in columns)])
    several = len(seeds) > 1
    over = f"mean ± standard deviation over {len(seeds)} seeds" if several else f"seed {seeds[0]}"
    notes = [f"{METRICS[metric]} on the test images at the end of training, {over}"]
    if paper:
        notes.append("in brackets the paper's")
    if study.baseline is not None:
        notes.append("relative gap of the means" + (" ± its standard error" if several else ""))
    return "; ".join(notes) + ".\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _format_estimate(estimate: Estimate | None, number: str) -> str:
    """A value and its error in a format such as "{:+.1f}%", the error without a sign."""
    if estimate is None:
        return "-"
    value, error = estimate
    return number.format(value) + ("" if error is None else f" ± {number.replace('+', '').format(error)}")
