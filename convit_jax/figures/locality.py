"""How local the attention of a run was, by epoch: non-locality per layer and gates per head.

These are figures 5 and 6 of the paper. Layers and heads are counted from 1, as there.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.isotonic import isotonic_regression

from convit_jax.analysis.locality import patch_distances
from convit_jax.figures.style import save_figure, tidy_axes
from convit_jax.rundir import read_metrics

PANELS_PER_ROW = 5


def draw_locality(run: Path, directory: Path, model: Mapping[str, Any]) -> list[Path]:
    """Draws the non-locality and gates (of GPSA) that a run logged; returns the paths. `model`: its settings."""
    lines = read_metrics(run / "metrics.jsonl")
    paths = []
    for name, plot in (("nonlocality", plot_nonlocality), ("gates", plot_gates)):
        logged = [line for line in lines if name in line]
        if logged:
            figure = plot([line["epoch"] for line in logged], np.array([line[name] for line in logged]), model)
            paths += save_figure(figure, directory, name)
    return paths


def plot_nonlocality(epochs: Sequence[float], values: np.ndarray, model: Mapping[str, Any]) -> Figure:
    """Returns the figure of non-locality [evaluations, layers, heads] in patches, Eq. 8: the mean of each layer."""
    figure = Figure(figsize=(6, 3.75), layout="constrained")
    axes = figure.subplots()
    layers = values.shape[1]
    for layer in range(layers):
        kind, dashes = ("GPSA", "-") if layer < model["local_up_to_layer"] else ("plain", "--")
        means = values[:, layer].mean(axis=1)
        axes.plot(epochs, means, ls=dashes, label=f"layer {layer + 1} ({kind})", **_look(layer, layers, epochs))
    rows, columns = (side // model["patch_size"] for side in model["image_size"])
    axes.axhline(patch_distances((rows, columns)).mean(), color="0.45", lw=1, ls=":", label="uniform")
    axes.set(xlabel="epoch", ylabel=f"non-locality (patches, of {rows} x {columns})", xlim=(0, None), ylim=(0, None))
    tidy_axes(axes)
    _label_ends(axes, epochs[-1])
    return figure


def plot_gates(epochs: Sequence[float], values: np.ndarray, model: Mapping[str, Any]) -> Figure:
    """Returns the figure of gates [evaluations, GPSA layers, heads]: a panel per layer, a curve per head."""
    layers, heads = values.shape[1:]
    columns = min(PANELS_PER_ROW, layers)
    rows = math.ceil(layers / columns)
    figure = Figure(figsize=(1.8 + 1.6 * columns, 0.9 + 1.9 * rows), layout="constrained")
    limits = max(-0.02, values.min() - 0.05), min(1.02, values.max() + 0.05)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for layer, axes in enumerate(panels[:layers]):
        for head in range(heads):
            axes.plot(epochs, values[:, layer, head], label=f"{head + 1}", **_look(head, heads, epochs))
        axes.plot(epochs, values[:, layer].mean(axis=1), color="black", lw=1.6, ls=(0, (1, 2)), label="mean")
        axes.set(xlim=(0, None), ylim=limits, title=f"layer {layer + 1}")
        tidy_axes(axes)
    for number in range(layers, len(panels)):
        panels[number].remove()
        panels[number - columns].xaxis.set_tick_params(labelbottom=True)
    figure.supxlabel("epoch")
    figure.supylabel("gate $\\sigma(\\lambda)$")
    handles, labels = panels[0].get_legend_handles_labels()
    ncols = 2 if heads > 10 * rows else 1
    figure.legend(handles, labels, title="head", loc="outside right center", ncols=ncols, frameon=False)
    return figure


def _look(number: int, count: int, epochs: Sequence[float]) -> dict[str, Any]:
    """Shade and markers of curve `number` of `count`; a few evaluations are marked one by one."""
    shade = colormaps["viridis"](0.88 * number / max(count - 1, 1))
    return {"color": shade, "lw": 1.6, "marker": "o" if len(epochs) <= 12 else None, "ms": 4}


def _label_ends(axes: Axes, epoch: float) -> None:
    """Writes the name of each curve at its end, at this epoch; names move apart until they can be read."""
    curves = sorted((float(np.asarray(line.get_ydata())[-1]), str(line.get_label()), line) for line in axes.lines)
    ends = np.array([end for end, _, _ in curves])
    across = axes.get_yaxis_transform()  # x from 0 to 1, y as the curves
    apart = 0.055 * axes.get_ylim()[1] * np.arange(len(ends))
    places = isotonic_regression(ends - apart) + apart  # nearest to the ends
    for (end, name, line), place in zip(curves, places, strict=True):
        leader = {"arrowstyle": "-", "color": line.get_color(), "lw": 0.8, "relpos": (0, 0.5)}
        label_at = (1.05, place)
        axes.annotate(name, (epoch, end), label_at, textcoords=across, arrowprops=leader, va="center", fontsize=8)
