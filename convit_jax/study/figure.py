"""The figure of a study: a line per row if the columns are numbers, otherwise dots per row, a colour per column.

Bars are the standard deviation over seeds, those of a gap its standard error. The paper's numbers are dotted
lines or diamonds.
"""

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from convit_jax.figures.style import COLORS, add_title, save_figure, tidy_axes
from convit_jax.study.plan import METRICS, Study, is_number
from convit_jax.study.runner import Outcome
from convit_jax.study.table import Cells, Estimate, describe_seeds, gap_to_baseline, mean_over_seeds


def draw_study(study: Study, outcomes: Mapping[str, Outcome], output: Path) -> None:
    """Draws figure.pdf and figure.png of a study's first metric into its directory; nothing if no run is done."""
    ours, paper = mean_over_seeds(study, outcomes, study.metrics[0])
    if ours:
        columns = study.column_names()
        plot = _plot_lines if len(columns) > 1 and all(map(is_number, columns)) else _plot_dots
        figure = plot(study, ours, paper)
        figure.axes[0].set_title(describe_seeds(ours), loc="left", fontsize=8.5)
        add_title(figure, study.title)
        save_figure(figure, output, "figure")


def _plot_lines(study: Study, ours: Cells, paper: Cells) -> Figure:
    """The metric over the columns; next to it the gap to the baseline, if there is one."""
    columns, gaps = study.column_names(), study.baseline is not None
    figure = Figure(figsize=(9.6 if gaps else 6.2, 3.9), layout="constrained")
    panels = figure.subplots(1, 1 + gaps, squeeze=False, width_ratios=(3, 2)[: 1 + gaps])[0]
    for row, color, marker in zip(study.row_names(), itertools.cycle(COLORS), itertools.cycle("os^DvPX"), strict=False):
        label = f"{study.rows} {row:g}" if is_number(row) else study.row_label(row)
        styles = {"marker": marker, "label": label}, {"ls": ":", "label": f"{label}, paper"}
        for means, style in zip((ours, paper), styles, strict=True):
            for axes, cells in zip(panels, (means, gap_to_baseline(study, means)), strict=False):
                points = {column: cells[row, column] for column in columns if (row, column) in cells}
                _plot_estimates(axes, points, {"color": color, **style})
    for axes in panels:
        tidy_axes(axes)
        axes.set_xscale("linear" if study.scale == "linear" else "log")
        axes.xaxis.set_major_locator(FixedLocator(columns))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticklabels([study.column_label(column) for column in columns])
        axes.set_xlabel(study.columns)
    panels[0].set_ylabel(METRICS[study.metrics[0]])
    panels[0].legend(frameon=False, fontsize=8)
    if gaps:
        panels[1].set_ylabel(f"relative gap to {study.row_label(study.baseline)} (%)")
    return figure


def _plot_dots(study: Study, ours: Cells, paper: Cells) -> Figure:
    rows = study.row_names()
    figure = Figure(figsize=(6.2, 1.8 + 0.33 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for column, color in zip(study.column_names(), itertools.cycle(COLORS), strict=False):
        of = f"{study.columns}: {study.column_label(column)}, " if study.columns else ""
        styles = {"marker": "o", "label": f"{of}this code"}, {"marker": "D", "mfc": "none", "label": f"{of}paper"}
        for cells, style in zip((ours, paper), styles, strict=True):
            points = {place: cells[row, column] for place, row in enumerate(rows) if (row, column) in cells}
            _plot_estimates(axes, points, {"color": color, "ls": "", **style}, across=True)
    tidy_axes(axes)
    axes.set_yticks(range(len(rows)), [study.row_label(row) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(METRICS[study.metrics[0]])
    figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=8)
    return figure


def _plot_estimates(axes: Axes, points: Mapping[Any, Estimate], style: Any, *, across: bool = False) -> None:
    """Values with error bars at their places, along x instead of y if `across`."""
    if points:
        values, errors, _ = zip(*points.values(), strict=True)
        bars = None if all(map(math.isnan, errors)) else errors  # the legend shows bars, too
        if across:
            axes.errorbar(values, list(points), xerr=bars, capsize=3, **style)
        else:
            axes.errorbar(list(points), values, yerr=bars, capsize=3, **style)
