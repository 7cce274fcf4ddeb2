"""The figure of a study: lines if the columns are numbers, otherwise a panel of dots per column.

Small points are seeds, large ones their mean with a bar of one standard deviation. Rows differ in colour and
marker. The axis labels say what the bars mean.
"""

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from convit_jax.figures.style import COLORS, save_figure, tidy_axes
from convit_jax.study.plan import METRICS, Study
from convit_jax.study.runner import Outcome
from convit_jax.study.table import Cells, collect_cells, relative_gap, sample_deviation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_study(study: Study, outcomes: Mapping[str, Outcome], output: Path) -> None:
    """Draws figure.pdf and figure.png of a study into its directory; nothing if no run is done."""
    cells = collect_cells(study, outcomes, study.metrics[0])
    if any(cells.values()):
        figure = _plot_lines(study, cells) if study.has_axis() else _plot_dots(study, cells)
        save_figure(figure, output, "figure")


def _plot_lines(study: Study, cells: Cells) -> "Figure":
    """The metric over the columns, a line per row; next to it the gap to the baseline, if there is one."""
    from matplotlib.figure import Figure

    columns, gaps, metric = study.column_names(), study.baseline is not None, study.metrics[0]
    paper: Cells = {cell: [found[metric]] for cell, found in study.paper.items() if metric in found}
    figure = Figure(figsize=(9.6 if gaps else 6.2, 3.9), layout="constrained")
    panels = figure.subplots(1, 1 + gaps, squeeze=False, width_ratios=(3, 2)[: 1 + gaps])[0]
    for row, color, marker in zip(study.row_names(), itertools.cycle(COLORS), itertools.cycle("os^DvPX"), strict=False):
        label = study.row_label(row, in_figure=True)
        if sum(cell[0] == row for cell in cells) == 1:  # a level to compare with, as "no GPSA"
            _plot_level(panels[0], next(cells[cell] for cell in cells if cell[0] == row), color, label)
            continue
        look = {"color": color, "marker": marker, "lw": 1.6, "label": label}
        theirs = {"color": color, "ls": ":", "lw": 1.2, "label": f"{label}, paper"}
        for source, style in ((cells, look), (paper, theirs)):
            numbers = {column: source[row, column] for column in columns if source.get((row, column))}
            _plot_means(panels[0], numbers, style)
            if gaps and row != study.baseline:
                points = [(c, relative_gap(numbers[c], source.get((study.baseline, c), []))) for c in numbers]
                known = [(column, gap[0], gap[1]) for column, gap in points if gap is not None]
                if known:
                    places, values, errors = zip(*known, strict=True)
                    bars = None if None in errors else errors
                    panels[1].errorbar(places, values, bars, **{"capsize": 3, **style})
    _label_columns(panels[0], study, "standard deviation over seeds", cells)
    panels[0].set_title(study.title, loc="left", fontweight="bold", fontsize=11)
    panels[0].set_ylabel(METRICS[metric])
    panels[0].legend(frameon=False, fontsize=8)
    if gaps:
        _label_columns(panels[1], study, "standard error", cells)
        panels[1].axhline(0, color="black", lw=0.8)
        panels[1].set_ylabel(f"relative gap to {study.row_label(study.baseline)} (%)")
    return figure


def _label_columns(axes: "Axes", study: Study, bars: str, cells: Cells) -> None:
    """Makes the columns the ticks of the x axis."""
    from matplotlib.ticker import FixedLocator, NullLocator

    tidy_axes(axes)
    axes.margins(x=0.08)
    axes.set_xscale("linear" if study.scale == "linear" else "log")
    axes.xaxis.set_major_locator(FixedLocator(study.column_names()))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([study.column_label(column) for column in study.column_names()])
    axes.set_xlabel(_label_bars(study.columns or "", bars, cells))


def _label_bars(label: str, bars: str, cells: Cells) -> str:
    """An axis label that also says what the bars are, if there are any."""
    return label + (f"\nbars: {bars}" if any(len(numbers) > 1 for numbers in cells.values()) else "")


def _plot_level(axes: "Axes", numbers: Sequence[float], color: str, label: str) -> None:
    """A row of one number as a horizontal line with a band of one standard deviation."""
    if numbers:
        mean, deviation = statistics.fmean(numbers), sample_deviation(numbers) or 0.0
        axes.axhline(mean, color=color, ls="--", lw=1, label=label)
        axes.axhspan(mean - deviation, mean + deviation, color=color, alpha=0.15, lw=0)


def _plot_dots(study: Study, cells: Cells) -> "Figure":
    """A panel per column, with a line of dots per row."""
    from matplotlib.figure import Figure

    rows, columns, metric = study.row_names(), study.column_names(), study.metrics[0]
    size = (3.0 + 3.2 * len(columns), 1.3 + 0.33 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(columns), sharex=True, sharey=True, squeeze=False)[0]
    handles: list[Any] = []
    look = {"color": COLORS[1], "marker": "o", "ls": ""}
    for axes, column in zip(panels, columns, strict=True):
        for place, row in enumerate(rows):
            numbers, paper = cells.get((row, column)), study.paper.get((row, column), {}).get(metric)
            if numbers:
                _plot_means(axes, {place: numbers}, look, across=True)
            if paper is not None:
                handles = axes.plot(paper, place, "D", mfc="none", mec=COLORS[0], ms=6, label="paper")
        axes.set_yticks(range(len(rows)), [study.row_label(row, in_figure=True) for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel(_label_bars(METRICS[metric], "standard deviation over seeds", cells))
        tidy_axes(axes)
        if study.columns:
            axes.set_title(f"{study.columns}: {study.column_label(column)}", fontsize=10)
    figure.suptitle(study.title, x=0.01, ha="left", fontweight="bold", fontsize=11)
    if handles:
        handles += panels[0].plot([], [], **look, label="this code")
        figure.legend(handles=handles, frameon=False, loc="upper right", borderaxespad=0, ncols=2)
    return figure


def _plot_means(
    axes: "Axes", cells: Mapping[Any, Sequence[float]], look: Mapping[str, Any], *, across: bool = False
) -> None:
    """Means over seeds with bars of a standard deviation, and the seeds; across: along x instead of y."""
    if not cells:
        return
    means = [statistics.fmean(numbers) for numbers in cells.values()]
    seeds = [(place, number) for place, numbers in cells.items() for number in numbers]
    several = len(seeds) > len(means)
    bars = [sample_deviation(numbers) or 0.0 for numbers in cells.values()] if several else None
    points = (means, list(cells), None, bars) if across else (list(cells), means, bars)
    axes.errorbar(*points, **{"capsize": 3, **look})
    if several:
        x, y = zip(*(seed[::-1] if across else seed for seed in seeds), strict=True)
        axes.scatter(x, y, s=12, color="white", ec=look["color"], lw=0.8, zorder=3)
