"""The figure of a study: lines over an axis of numbers, or dots by row where the columns are names.

Each seed is a small point, the mean a large one with a bar of one standard deviation; what bars are stands
below the axis. Rows differ in colour and marker, are named where they end, and the colours are told apart
by the colour-blind.
"""

import itertools
import statistics

from convit_jax.figures.style import COLORS, STYLE, save
from convit_jax.study.plan import METRICS
from convit_jax.study.table import relative_gap, spread, values

ORDERED = ("#6BAED6", "#2171B5", "#08306B", "#000000")  # of rows that are numbers: the larger the darker
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#777777"
PAPER = dict(ls=":", lw=1.2, zorder=1)


def draw(plan, outcomes, output):
    """Draw figure.pdf and figure.png of a study into a directory; nothing if no run is done.

    outcomes: {name of the run: Outcome}.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    cells = values(plan, outcomes, plan.metrics[0])
    if not any(cells.values()):
        return
    with rc_context(STYLE):
        figure = _lines(plan, cells, Figure) if plan.numeric() else _dots(plan, cells, Figure)
        save(figure, output / "figure")


def _lines(plan, cells, Figure):
    """The metric over the columns, a line for each row; beside it the gap to the baseline, if any."""
    from matplotlib.ticker import FixedLocator, NullLocator

    gaps, metric = plan.baseline is not None, plan.metrics[0]
    figure = Figure(figsize=(9.6 if gaps else 6.2, 3.9), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12)
    panels = figure.subplots(1, 2 if gaps else 1, squeeze=False, width_ratios=(3, 2) if gaps else None)[0]
    rows, columns = plan.row_names(), plan.column_names()
    ends, marks, errors = [], set(), []
    for number, (row, look) in enumerate(zip(rows, _looks(rows), strict=True)):
        shown = [(column, cells[row, column]) for column in columns if cells.get((row, column))]
        means = [statistics.fmean(numbers) for _, numbers in shown]
        label = plan.label(row, long=True)
        if not shown:
            continue
        if sum((row, column) in cells for column in columns) == 1:  # a level to compare with, not a line
            panels[0].axhline(means[0], color=GREY, ls="--", lw=1, zorder=1)
            around = spread(shown[0][1])
            if around is not None:
                low, high = means[0] - around, means[0] + around
                panels[0].axhspan(low, high, color=GREY, alpha=0.15, lw=0, zorder=0)
                marks.add("band")
            ends.append((means[0], label, GREY))
        else:
            marks.update("bars" for _, numbers in shown if spread(numbers) is not None)
            aside = 5 * (number - (len(rows) - 1) / 2)
            _with_bars(panels[0], [x for x, _ in shown], [n for _, n in shown], look, lw=1.6, aside=aside)
            ends.append((means[-1], label, look["color"]))
        paper = {c: plan.paper[row, c][metric] for c in columns if metric in plan.paper.get((row, c), {})}
        if paper:
            panels[0].plot(paper.keys(), paper.values(), color=look["color"], **PAPER)
        if gaps and row != plan.baseline:
            of_row = [(c, relative_gap(n, cells.get((plan.baseline, c), []))) for c, n in shown]
            errors += [gap[1] for _, gap in of_row if gap is not None]
            of_row = [(c, gap[0], gap[1] or 0.0) for c, gap in of_row if gap is not None]
            if of_row:
                panels[1].errorbar(*zip(*of_row, strict=True), **look, lw=1.6, ms=6, capsize=3)
            theirs = {c: plan.paper.get((plan.baseline, c), {}).get(metric) for c in paper}
            of_paper = [(c, relative_gap([paper[c]], [theirs[c]])[0]) for c in paper if theirs[c]]
            if of_paper:
                panels[1].plot(*zip(*of_paper, strict=True), color=look["color"], **PAPER)
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.margins(x=0.08)
        panel.set_xscale("linear" if plan.scale == "linear" else "log")
        panel.xaxis.set_major_locator(FixedLocator(columns))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_xticklabels([plan.column_label(column) for column in columns])
    panels[0].set_xlabel(_named(plan.columns, marks, "standard deviation over seeds"))
    panels[0].set_title(plan.title, loc="left", fontweight="bold", fontsize=11)
    panels[0].set_ylabel(METRICS[metric])
    _name_ends(panels[0], ends)
    if any(metric in numbers for numbers in plan.paper.values()):
        panels[0].plot([], [], color="black", label="the paper's", **PAPER)
        panels[0].legend(frameon=False, loc="lower right")
    if gaps:
        panels[1].axhline(0, color="black", lw=0.8)
        panels[1].set_ylabel(f"relative gap to {plan.label(plan.baseline)} (%)")
        bars = {"bars" for error in errors if error is not None}
        panels[1].set_xlabel(_named(plan.columns, bars, "standard error"))
    return figure


def _dots(plan, cells, Figure):
    """A panel for each column, a line of it for each row."""
    rows, columns = plan.row_names(), plan.column_names()
    size = (3.0 + 3.2 * len(columns), 1.3 + 0.33 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(columns), sharex=True, sharey=True, squeeze=False)[0]
    metric, handles = plan.metrics[0], []
    bars = {"bars" for numbers in cells.values() if spread(numbers) is not None}
    for panel, column in zip(panels, columns, strict=True):
        for place, row in enumerate(rows):
            look = {"color": COLORS[1], "marker": "o"}
            numbers = cells.get((row, column))
            if numbers:
                _with_bars(panel, [place], [numbers], look, across=True)
            paper = plan.paper.get((row, column), {}).get(metric)
            if paper is not None:
                handles = panel.plot(paper, place, "D", mfc="none", mec=COLORS[0], ms=6, label="the paper's")
        panel.set_yticks(range(len(rows)), [plan.label(row, long=True) for row in rows])
        panel.set_ylim(len(rows) - 0.5, -0.5)
        panel.grid(alpha=0.3)
        panel.set_xlabel(_named(METRICS[metric], bars, "standard deviation over seeds"))
        if plan.columns is not None:
            panel.set_title(f"{plan.columns}: {plan.column_label(column)}", fontsize=10)
    figure.suptitle(plan.title, x=0.01, ha="left", fontweight="bold", fontsize=11)
    if handles:
        handles += panels[0].plot([], [], color=COLORS[1], marker="o", ls="", label="here")
        figure.legend(handles=handles, frameon=False, loc="upper right", borderaxespad=0, ncols=2)
    return figure


def _named(axis, marks, what):
    """The name of an axis, and below it what the marks of a spread, as {"bars"}, are, if there are any."""
    spread_of = f"{' and '.join(sorted(marks, reverse=True))}: {what}" if marks else None
    return "\n".join(filter(None, (axis, spread_of)))


def _with_bars(panel, places, cells, look, *, across=False, lw=0.0, aside=0.0):
    """Means with bars of a standard deviation, and each seed as a point next to them.

    across: along x instead of y. aside: points by which all is shifted, so that rows do not hide each other.
    """
    from matplotlib.transforms import ScaledTranslation

    def shifted(points):
        way = (0, points / 72) if across else (points / 72, 0)
        return panel.transData + ScaledTranslation(*way, panel.figure.dpi_scale_trans)

    means = [statistics.fmean(numbers) for numbers in cells]
    bars = [spread(numbers) or 0.0 for numbers in cells]
    reach = [
        (place, m + bar * sign) for place, m, bar in zip(places, means, bars, strict=True) for sign in (-1, 1)
    ]
    seeds = [(place, n) for place, numbers in zip(places, cells, strict=True) for n in numbers]
    mean = (places, means, bars)
    if across:
        mean = (means, places, None, bars)
        reach, seeds = [point[::-1] for point in reach], [point[::-1] for point in seeds]
    bar = dict(lw=lw, elinewidth=1.2, ms=6, capsize=3, zorder=3, transform=shifted(aside))
    panel.errorbar(*mean, **look, **bar)
    if len(seeds) > len(means):
        point = dict(s=12, color=look["color"], alpha=0.6, lw=0, zorder=4, transform=shifted(aside + 5))
        panel.scatter(*zip(*seeds, strict=True), **point)
    panel.update_datalim([*reach, *seeds])  # matplotlib leaves out what is shifted
    panel.autoscale_view()


def _looks(rows):
    """Colour and marker of each row."""
    numbers = [row for row in rows if not isinstance(row, str)]
    colors, markers = itertools.cycle(COLORS), itertools.cycle(MARKERS)
    shades = dict(zip(sorted(numbers), ORDERED, strict=False))
    return [{"color": shades.get(row) or next(colors), "marker": next(markers)} for row in rows]


def _name_ends(panel, ends):
    """Write each line's name at its right end, apart from each other."""
    low, high = panel.get_ylim()
    apart, at = 0.06 * (high - low), None
    for height, label, color in sorted(ends):
        at = height if at is None else max(height, at + apart)
        panel.annotate(
            label,
            (1.01, at),
            xycoords=("axes fraction", "data"),
            color=color,
            va="center",
            fontweight="bold",
        )
