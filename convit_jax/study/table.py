"""The tables of a study: table.csv has a line per run, table.md and table.tex the means over seeds.

A cell is mean ± sample standard deviation over seeds, their number if some are missing, then the paper's number.
"""

import csv
import itertools
import math
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from convit_jax.rundir import atomic_write
from convit_jax.study.plan import METRICS, Name, Study
from convit_jax.study.runner import Outcome

Lines = list[list[str]]
LATEX = str.maketrans({"\\": r"\textbackslash{}", "±": r"$\pm$"} | {each: f"\\{each}" for each in "%&_#${}"})


class Estimate(NamedTuple):
    """A number over seeds."""

    value: float
    error: float  # standard deviation of a mean, standard error of a gap; NaN of one seed
    seeds: int


Cells = Mapping[tuple[Name, Name], Estimate]  # by row and column


def mean_over_seeds(study: Study, outcomes: Mapping[str, Outcome], metric: str) -> tuple[Cells, Cells]:
    """Returns mean and sample standard deviation of the seeds that are done, and the paper's numbers."""
    numbers: dict[tuple[Name, Name], list[float]] = {}
    for run in study.runs:
        if last := outcomes[run.name].last:
            numbers.setdefault((run.row, run.column), []).append(last[metric])
    ours = {cell: estimate_mean(each) for cell, each in numbers.items()}
    paper = {(run.row, run.column): estimate_mean([run.paper[metric]]) for run in study.runs if metric in run.paper}
    return ours, paper


def estimate_mean(numbers: list[float]) -> Estimate:
    """Returns mean and sample standard deviation of a number per seed."""
    spread = statistics.stdev(numbers) if len(numbers) > 1 else math.nan
    return Estimate(statistics.fmean(numbers), spread, len(numbers))


def gap_to_baseline(study: Study, means: Cells) -> Cells:
    """Compares each mean m with the baseline's m0 in the same column, as the paper's Table 2 does.

    Returns:
      (m - m0) / m0 and its standard error, both in per cent. With the standard errors s and s0 of the means
      the latter is sqrt(s^2 + (m / m0)^2 s0^2) / m0. No cell without both means, and none for the baseline itself.
    """
    gaps = {}
    for (row, column), mean in means.items():
        base = means.get((study.baseline, column))
        if row != study.baseline and base and base.value:
            of_mean, of_base = (each.error / math.sqrt(each.seeds) for each in (mean, base))
            error = 100 * math.hypot(of_mean, mean.value / base.value * of_base) / base.value
            gap = 100 * (mean.value - base.value) / base.value
            gaps[row, column] = Estimate(gap, error, min(mean.seeds, base.seeds))
    return gaps


def describe_seeds(cells: Cells) -> str:
    """Returns over how many seeds the means are: "one seed", or "mean ± standard deviation over 2 to 5 seeds"."""
    counts = sorted({each.seeds for each in cells.values()})
    if not counts or counts[-1] == 1:
        return "one seed" if counts else "no run is done"
    numbers = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else counts[0]
    return f"mean ± standard deviation over {numbers} seeds"


def write_tables(study: Study, outcomes: Mapping[str, Outcome], output: Path) -> None:
    """Writes table.csv, table.md and table.tex into the directory of the study."""
    with atomic_write(output / "table.csv") as file:
        writer = csv.writer(file, lineterminator="\n")
        file.write("run,row,column,seed,state,step,steps,top1,top5,loss,best_top1,seconds,failure\n")
        for run in study.runs:
            found = outcomes[run.name]
            last = [found.last.get(metric) for metric in METRICS]
            facts = (run.name, run.row, run.column, run.seed, found.state, found.step, found.steps)
            writer.writerow([*facts, *last, found.best, found.seconds, found.failure])
    for name, text in (("table.md", format_markdown(study, outcomes)), ("table.tex", format_latex(study, outcomes))):
        with atomic_write(output / name) as file:
            file.write(text)


def format_markdown(study: Study, outcomes: Mapping[str, Outcome]) -> str:
    """Returns the text of table.md: a table per metric, failures, what is left, the command."""
    parts = [f"# {study.title}", study.question]
    for metric in study.metrics:
        caption, [[head], *blocks] = make_table(study, outcomes, metric)
        lines = [head, ["---"] * len(head), *itertools.chain(*blocks)]
        parts += [caption, "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    failed = [f"- {name}: {found.failure}" for name, found in outcomes.items() if found.state == "failed"]
    if failed:
        parts.append("Failed:\n\n" + "\n".join(failed))
    left = sum(found.state in ("begun", "to do") for found in outcomes.values())
    if left:
        parts.append(f"Not done yet: {left} of {len(outcomes)} runs.")
    command = " ".join(["python -m convit_jax.study", study.source, *study.changes])
    return "\n\n".join([*parts, f"`{command}`"]) + "\n"


def format_latex(study: Study, outcomes: Mapping[str, Outcome]) -> str:
    r"""Returns the text of table.tex, a float per metric; the document needs \usepackage{booktabs}."""
    floats = []
    for metric in study.metrics:
        caption, blocks = make_table(study, outcomes, metric)
        texts = ["".join(f"{' & '.join(map(_escape, line))} \\\\\n" for line in block) for block in blocks]
        lines = "\\midrule\n".join(texts)
        floats.append(rf"""\begin{{table}}
\centering
\caption{{{_escape(f"{study.title}: {caption}")}}}
\begin{{tabular}}{{l{"c" * len(study.column_names())}}}
\toprule
{lines}\bottomrule
\end{{tabular}}
\end{{table}}
""")
    return "\n".join(floats)


def _escape(text: str) -> str:
    """A text in LaTeX, with a minus sign before a number and as an empty cell."""
    return re.sub(r"(^|\()-(?=\d|$)", r"\1$-$", text.translate(LATEX))


def make_table(study: Study, outcomes: Mapping[str, Outcome], metric: str) -> tuple[str, list[Lines]]:
    """Returns the caption of a table and its blocks of lines: head, rows, and gaps to the baseline if there is one."""
    ours, paper = mean_over_seeds(study, outcomes, metric)
    rows, columns, planned = study.row_names(), study.column_names(), len({run.seed for run in study.runs})
    caption = f"{METRICS[metric]} on the test images at the end of training, {describe_seeds(ours)}"
    caption += "; in brackets the paper's" if paper else ""
    corner = f"{study.rows} \\ {study.columns}" if study.columns else study.rows
    head = [corner, *(study.column_label(column) if study.columns else METRICS[metric] for column in columns)]

    def make_line(label: str, row: Name, ours: Cells, paper: Cells, numbers: tuple[str, str]) -> list[str]:
        """A cell per column; `numbers` are the formats of our value and the paper's."""
        pairs = [(ours.get((row, column)), paper.get((row, column))) for column in columns]
        return [label, *(_format_cell(*pair, planned, *numbers) for pair in pairs)]

    blocks = [[head], [make_line(study.row_label(row), row, ours, paper, ("{:.2f}", "{}")) for row in rows]]
    if study.baseline is not None:
        caption += "; relative gap of the means" + (" ± its standard error" if "±" in caption else "")
        gaps = gap_to_baseline(study, ours), gap_to_baseline(study, paper), ("{:+.1f}%", "{:+.1f}%")
        over = f" over {study.row_label(study.baseline)}"
        others = [row for row in rows if row != study.baseline]
        blocks.append([make_line(study.row_label(row) + over, row, *gaps) for row in others])
    return f"{caption}.", blocks


def _format_cell(ours: Estimate | None, paper: Estimate | None, planned: int, number: str, of_paper: str) -> str:
    """'57.41 ± 0.32 [n = 2] (57.4)': n if seeds are missing, in round brackets the paper's."""
    text = "-"
    if ours:
        text = number.format(ours.value)
        text += "" if math.isnan(ours.error) else f" ± {number.replace('+', '').format(ours.error)}"
        text += f" [n = {ours.seeds}]" if ours.seeds < planned else ""
    return text + (f" ({of_paper.format(paper.value)})" if paper else "")
