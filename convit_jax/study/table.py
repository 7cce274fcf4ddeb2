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


def collect_cells(study: Study, outcomes: Mapping[str, Outcome], metric: str) -> Cells:
    """Returns {(row, column): the metric of each seed that is done}."""
    cells: Cells = {(run.row, run.column): [] for run in study.runs}
    for run in study.runs:
        if outcomes[run.name].state == "done":
            cells[run.row, run.column].append(outcomes[run.name].last[metric])
    return cells


def sample_deviation(numbers: Sequence[float]) -> float | None:
    """Returns the sample standard deviation; None of fewer than two numbers."""
    return statistics.stdev(numbers) if len(numbers) > 1 else None


def relative_gap(numbers: Sequence[float], baseline: Sequence[float]) -> tuple[float, float | None] | None:
    """Compares two means m and m0 as the paper's Table 2 does.

    Returns:
      ((m - m0) / m0, its standard error), both in per cent. With the standard errors s and s0 of the means
      the latter is sqrt(s^2 + (m / m0)^2 s0^2) / m0; None for fewer than two numbers. None without numbers.
    """
    if not numbers or not baseline or not any(baseline):
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
        head = "run row column seed state step steps top1 top5 loss best_top1 seconds failure"
        writer.writerow(head.split())
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
    seeds = sorted({run.seed for run in study.runs})
    corner = f"{study.rows} \\ {study.columns}" if study.columns else study.rows
    heads = [study.column_label(column) if study.columns else METRICS[metric] for column in columns]
    lines = [[corner, *heads], ["---"] * (1 + len(heads))]
    for row in study.row_names():
        words = [_format_cell(study, cells, metric, (row, column), len(seeds)) for column in columns]
        lines.append([study.row_label(row), *words])
    for row in study.row_names() if study.baseline is not None else ():
        if row != study.baseline:
            label = f"{study.row_label(row)} over {study.row_label(study.baseline)}"
            lines.append([label, *(_format_gap(study, cells, metric, row, column) for column in columns)])
    several = len(seeds) > 1
    over = f"mean ± standard deviation over {len(seeds)} seeds" if several else f"seed {seeds[0]}"
    notes = [f"{METRICS[metric]} on the test images at the end of training, {over}"]
    if any(metric in numbers for numbers in study.paper.values()):
        notes.append("in brackets the paper's")
    if study.baseline is not None:
        notes.append("relative gap of the means" + (" ± its standard error" if several else ""))
    return "; ".join(notes) + ".\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _format_cell(study: Study, cells: Cells, metric: str, cell: tuple[Name, Name], seeds: int) -> str:
    """'57.41 ± 0.32 (57.4)', with the number of seeds if some are missing."""
    if cell not in cells:
        return ""
    numbers, text = cells[cell], "-"
    if numbers:
        deviation = sample_deviation(numbers)
        text = f"{statistics.fmean(numbers):.2f}"
        text += f" ± {deviation:.2f}" if deviation is not None else ""
        text += f" [n = {len(numbers)}]" if len(numbers) < seeds else ""
    paper = study.paper[cell].get(metric)
    return text if paper is None else f"{text} ({paper})"


def _format_gap(study: Study, cells: Cells, metric: str, row: Name, column: Name) -> str:
    """'+24.3% ± 1.1% (+24.1%)'."""
    pair = (row, column), (study.baseline, column)
    gap = relative_gap(*(cells.get(cell, []) for cell in pair))
    text = "-" if gap is None else f"{gap[0]:+.1f}%" + (f" ± {gap[1]:.1f}%" if gap[1] is not None else "")
    papers = [[study.paper[cell][metric]] for cell in pair if metric in study.paper.get(cell, {})]
    paper = relative_gap(*papers) if len(papers) == 2 else None
    return text if paper is None else f"{text} ({paper[0]:+.1f}%)"
