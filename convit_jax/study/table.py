"""The tables of a study: table.csv has a line for each run, table.md the means over seeds.

A cell of table.md is mean ± standard deviation over seeds, then the paper's number in brackets. The
relative gap of Table 2 is (m - m0) / m0 of two means; its error follows from the standard errors s, s0 of
the means as sqrt(s^2 + (m / m0)^2 s0^2) / m0.
"""

import csv
import io
import math
import statistics

from convit_jax.rundir import atomic_write
from convit_jax.study.plan import METRICS

COLUMNS = ("run", "row", "column", "seed", "state", "step", "steps", "top1", "top5", "loss", "best_top1")


def values(plan, outcomes, metric):
    """{(row, column): [the metric's last value of each seed that is done]}."""
    cells = {(run.row, run.column): [] for run in plan.runs}
    for run in plan.runs:
        if outcomes[run.name].state == "done":
            cells[run.row, run.column].append(outcomes[run.name].last[metric])
    return cells


def spread(numbers):
    """The sample standard deviation; None of fewer than two numbers."""
    return statistics.stdev(numbers) if len(numbers) > 1 else None


def relative_gap(numbers, baseline):
    """(gap in per cent, its standard error or None) of the means of two lists; None if one is empty."""
    if not numbers or not baseline:
        return None
    mean, mean_0 = statistics.fmean(numbers), statistics.fmean(baseline)
    if mean_0 == 0:
        return None
    error = None
    if len(numbers) > 1 and len(baseline) > 1:
        of_mean = spread(numbers) / math.sqrt(len(numbers))
        of_mean_0 = spread(baseline) / math.sqrt(len(baseline))
        error = 100 * math.hypot(of_mean, mean / mean_0 * of_mean_0) / mean_0
    return 100 * (mean - mean_0) / mean_0, error


def write_tables(plan, outcomes, output):
    """Write table.csv and table.md into a directory; outcomes: {name of the run: Outcome}."""
    for name, text in (("table.csv", _csv(plan, outcomes)), ("table.md", markdown(plan, outcomes))):
        with atomic_write(output / name) as file:
            file.write(text)


def _csv(plan, outcomes):
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, "seconds", "failure"])
    for run in plan.runs:
        found = outcomes[run.name]
        last = [found.last.get(name) for name in ("top1", "top5", "loss")]
        of_run = (run.name, run.row, run.column, run.seed, found.state, found.step, found.steps)
        writer.writerow([*of_run, *last, found.best, found.seconds, found.failure])
    return text.getvalue()


def markdown(plan, outcomes):
    """The text of table.md."""
    parts = [f"# {plan.title}", plan.question]
    parts += [_table(plan, outcomes, metric) for metric in plan.metrics]
    states = {name: found.state for name, found in outcomes.items()}
    failed = [f"- {name}: {found.failure}" for name, found in outcomes.items() if found.state == "failed"]
    if failed:
        parts.append("Failed:\n\n" + "\n".join(failed))
    left = [name for name, state in states.items() if state in ("begun", "to do")]
    if left:
        parts.append(f"Not done yet: {len(left)} of {len(states)} runs.")
    source = " ".join(["python -m convit_jax.study", plan.source, *plan.changes])
    return "\n\n".join([*parts, f"`{source}`"]) + "\n"


def _table(plan, outcomes, metric):
    """One metric: a line for each row of the plan, and for its gap to the baseline."""
    cells, seeds = values(plan, outcomes, metric), _seeds(plan)
    columns = plan.column_names()
    head = [plan.rows if plan.columns is None else f"{plan.rows} \\ {plan.columns}"]
    lines = [head + [METRICS[metric] if c is None else plan.column_label(c) for c in columns]]
    lines.append(["---"] * len(lines[0]))
    for row in plan.row_names():
        cell = [_cell(plan, cells, metric, row, column, len(seeds)) for column in columns]
        lines.append([plan.label(row), *cell])
    for row in plan.row_names() if plan.baseline is not None else ():
        if row != plan.baseline:
            label = f"{plan.label(row)} over {plan.label(plan.baseline)}"
            lines.append([label, *(_gap(plan, cells, metric, row, column) for column in columns)])
    over = f", mean ± standard deviation over {len(seeds)} seeds" if len(seeds) > 1 else f", seed {seeds[0]}"
    notes = [METRICS[metric] + " on the test images at the end of training" + over]
    if any(metric in numbers for numbers in plan.paper.values()):
        notes.append("in brackets the paper's")
    if plan.baseline is not None:
        notes.append("relative gap of the means" + (" ± its standard error" if len(seeds) > 1 else ""))
    return "; ".join(notes) + ".\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _seeds(plan):
    return sorted({run.seed for run in plan.runs})


def _cell(plan, cells, metric, row, column, seeds):
    """'57.41 ± 0.32 (57.4)', with the number of seeds if some are missing."""
    if (row, column) not in cells:
        return ""
    numbers = cells[row, column]
    text = "-"
    if numbers:
        text = f"{statistics.fmean(numbers):.2f}"
        text += f" ± {spread(numbers):.2f}" if len(numbers) > 1 else ""
        text += f" [n = {len(numbers)}]" if len(numbers) < seeds else ""
    paper = plan.paper[row, column].get(metric)
    return text if paper is None else f"{text} ({paper})"


def _gap(plan, cells, metric, row, column):
    """'+24.3% ± 1.1% (+24%)'."""
    keys = (row, column), (plan.baseline, column)
    gap = relative_gap(*(cells.get(key, []) for key in keys))
    text = "-" if gap is None else f"{gap[0]:+.1f}%" + (f" ± {gap[1]:.1f}%" if gap[1] is not None else "")
    papers = [plan.paper.get(key, {}).get(metric) for key in keys]
    return text if None in papers else f"{text} ({100 * (papers[0] - papers[1]) / papers[1]:+.1f}%)"
