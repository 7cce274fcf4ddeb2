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
from convit_jax.study.plan import METRICS, Name, Study, is_number
from convit_jax.study.runner import Outcome
from convit_jax.study.table import Cells, collect_cells, relative_gap, sample_deviation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHADES = ("#6BAED6", "#2171B5", "#08306B", "#000000")  # of rows that are numbers, from small to large
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#777777"
PAPER: dict[str, Any] = {"ls": ":", "lw": 1.2, "zorder": 1}


def draw_study(study: Study, outcomes: Mapping[str, Outcome], output: Path) -> None:
    """Draws figure.pdf and figure.png of a study into its directory; nothing if no run is done."""
    cells = collect_cells(study, outcomes, study.metrics[0])
    if any(cells.values()):
        figure = _plot_lines(study, cells) if study.has_axis() else _plot_dots(study, cells)
        save_figure(figure, output, "figure")


def _plot_lines(study: Study, cells: Cells) -> "Figure":
    """The metric over the columns, a line per row; next to it the gap to the baseline, if there is one."""
    from matplotlib.figure import Figure

    rows, columns, gaps = study.row_names(), study.column_names(), study.baseline is not None
    paper: Cells = {
        cell: [it[study.metrics[0]]] for cell, it in study.paper.items() if study.metrics[0] in it
    }
    figure = Figure(figsize=(9.6 if gaps else 6.2, 3.9), layout="constrained")
    panels = figure.subplots(1, 1 + gaps, squeeze=False, width_ratios=(3, 2)[: 1 + gaps])[0]
    ends = []
    for row, look in zip(rows, _looks(rows), strict=True):
        numbers = {column: cells[row, column] for column in columns if cells.get((row, column))}
        theirs = {column: paper[row, column] for column in columns if (row, column) in paper}
        if not numbers:
            continue
        if sum(cell[0] == row for cell in cells) == 1:  # a level to compare with, as "no GPSA"
            look["color"] = GREY
            _plot_level(panels[0], next(iter(numbers.values())))
        else:
            _plot_means(panels[0], numbers, look, lw=1.6)
        last = statistics.fmean(list(numbers.values())[-1])
        ends.append((last, study.row_label(row, in_figure=True), look["color"]))
        if theirs:
            means = [statistics.fmean(each) for each in theirs.values()]
            panels[0].plot(list(theirs), means, color=look["color"], **PAPER)
        if gaps and row != study.baseline:
            for found, baseline, style in ((numbers, cells, {**look, "lw": 1.6}), (theirs, paper, PAPER)):
                points = [(c, relative_gap(found[c], baseline.get((study.baseline, c), []))) for c in found]
                known = [(column, gap[0], gap[1] or 0.0) for column, gap in points if gap is not None]
                if known:
                    style = {"color": look["color"], "capsize": 3, **style}
                    panels[1].errorbar(*zip(*known, strict=True), **style)

    _label_columns(panels[0], study, "standard deviation over seeds", cells)
    panels[0].set_title(study.title, loc="left", fontweight="bold", fontsize=11)
    panels[0].set_ylabel(METRICS[study.metrics[0]])
    _name_ends(panels[0], ends)
    if paper:
        panels[0].plot([], [], color="black", label="paper", **PAPER)
        panels[0].legend(frameon=False, loc="lower right")
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


def _plot_level(axes: "Axes", numbers: Sequence[float]) -> None:
    """A row of one number as a horizontal line with a band of one standard deviation."""
    mean, deviation = statistics.fmean(numbers), sample_deviation(numbers) or 0.0
    axes.axhline(mean, color=GREY, ls="--", lw=1, zorder=1)
    axes.axhspan(mean - deviation, mean + deviation, color=GREY, alpha=0.15, lw=0, zorder=0)


def _plot_dots(study: Study, cells: Cells) -> "Figure":
    """A panel per column, with a line of dots per row."""
    from matplotlib.figure import Figure

    rows, columns, metric = study.row_names(), study.column_names(), study.metrics[0]
    size = (3.0 + 3.2 * len(columns), 1.3 + 0.33 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(columns), sharex=True, sharey=True, squeeze=False)[0]
    handles: list[Any] = []
    for axes, column in zip(panels, columns, strict=True):
        for place, row in enumerate(rows):
            numbers, paper = cells.get((row, column)), study.paper.get((row, column), {}).get(metric)
            if numbers:
                _plot_means(axes, {place: numbers}, {"color": COLORS[1], "marker": "o"}, across=True)
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
        handles += panels[0].plot([], [], color=COLORS[1], marker="o", ls="", label="this code")
        figure.legend(handles=handles, frameon=False, loc="upper right", borderaxespad=0, ncols=2)
    return figure


def _plot_means(
    axes: "Axes",
    cells: Mapping[Any, Sequence[float]],
    look: Mapping[str, Any],
    *,
    across: bool = False,
    lw: float = 0.0,
) -> None:
    """Means over seeds with bars of a standard deviation, and the seeds; across: along x instead of y."""
    means = [statistics.fmean(numbers) for numbers in cells.values()]
    bars = [sample_deviation(numbers) or 0.0 for numbers in cells.values()]
    seeds = [(place, number) for place, numbers in cells.items() for number in numbers]
    places, numbers = zip(*seeds, strict=True)
    style = {"lw": lw, "elinewidth": 1.2, "ms": 6, "capsize": 3, **look}
    if across:
        axes.errorbar(means, list(cells), xerr=bars, **style)
        axes.scatter(numbers, places, s=12, color="white", ec=look["color"], lw=0.8, zorder=3)
    else:
        axes.errorbar(list(cells), means, yerr=bars, **style)
        axes.scatter(places, numbers, s=12, color="white", ec=look["color"], lw=0.8, zorder=3)


def _looks(rows: Sequence[Name]) -> list[dict[str, Any]]:
    """Colour and marker of each row."""
    numbers = sorted(row for row in rows if is_number(row))
    shades, colors = dict(zip(numbers, SHADES, strict=False)), itertools.cycle(COLORS)
    return [
        {"color": shades.get(row) or next(colors), "marker": marker}
        for row, marker in zip(rows, itertools.cycle(MARKERS), strict=False)
    ]


def _name_ends(axes: "Axes", ends: Sequence[tuple[float, str, str]]) -> None:
    """Writes (height, name, colour) of each line at its right end, without overlap."""
    low, high = axes.get_ylim()
    at = float("-inf")
    for height, name, color in sorted(ends):
        at = max(height, at + 0.06 * (high - low))
        place = axes.get_yaxis_transform()  # x in fractions of the axes, y in data
        axes.text(1.01, at, name, color=color, fontweight="bold", va="center", transform=place)
