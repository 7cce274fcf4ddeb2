"""Learning curves of a run: loss, top-1 accuracy and learning rate by epoch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from convit_jax.figures.style import COLORS, save_figure, tidy_axes
from convit_jax.rundir import read_metrics


def draw_curves(run: Path, directory: Path) -> list[Path]:
    """Draws the log of a run directory as curves.png and curves.pdf; returns their paths."""
    return save_figure(plot_curves(read_metrics(run / "metrics.jsonl")), directory, "curves")


def plot_curves(lines: Sequence[Mapping[str, Any]]) -> Figure:
    """Returns the figure of the lines of a metrics.jsonl."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = ("loss", "train_loss", "loss"), ("top-1 (%)", "train_top1", "top1"), ("learning rate", "lr", "")
    for axes, (title, training, test) in zip(figure.subplots(1, 3), panels, strict=True):
        for name, label, color, marker in (
            (training, "training", COLORS[1], None),
            (f"val_{test}", "test", COLORS[0], "o"),
            (f"val_ema_{test}", "test, moving average of the weights", COLORS[2], "s"),
        ):
            points = [(line["epoch"], line[name]) for line in lines if name in line]
            if points:
                marker = "o" if len(points) == 1 else marker  # a line of one point is invisible
                axes.plot(*zip(*points, strict=True), marker=marker, ms=3, lw=1.4, color=color, label=label)
        axes.set(xlabel="epoch", title=title)
        tidy_axes(axes)
        if test and axes.lines:
            axes.legend(frameon=False)
    return figure
