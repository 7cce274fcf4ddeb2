"""How local attention was in the course of a training, from the log in its run directory.

Non-locality of each layer by epoch (ConViT, Fig. 5), and the gates sigma(lambda) of the heads of each GPSA
layer by epoch (Fig. 6). Layers and heads are counted from 1, as in the paper.
"""

import math

import numpy as np

from convit_jax.analysis.locality import patch_distances
from convit_jax.figures.style import STYLE, save
from convit_jax.rundir import read_metrics

COLUMNS = 5  # panels in a row
GREY = "0.45"
SIZES = {"font.size": 8, "axes.titlesize": 8, "axes.labelsize": 9, "figure.labelsize": 9}


def draw_locality(run, directory, model):
    """Draw what a training has logged of its attention.

    Args:
      run: directory of train.py, finished or not. directory: of the pictures. model: settings of the run's
        VisionTransformer.

    Returns:
      The pictures' paths, of what was logged: nonlocality and, of a model with GPSA, gates; .png and .pdf.
    """
    from matplotlib import rc_context

    lines = read_metrics(run / "metrics.jsonl")
    paths = []
    for name, draw in (("nonlocality", draw_nonlocality), ("gates", draw_gates)):
        found = [line for line in lines if name in line]
        if not found:
            continue
        epochs, values = [line["epoch"] for line in found], np.array([line[name] for line in found])
        with rc_context(STYLE | SIZES):
            paths += save(draw(epochs, values, model), directory / name)
    return paths


def draw_nonlocality(epochs, values, model):
    """A Figure of non-locality [evaluations, layers, heads]: the mean over heads, a curve for each layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, 3), layout="constrained")
    panel = figure.subplots()
    layers, local = values.shape[1], model["local_up_to_layer"]
    for layer, color in enumerate(shades(layers)):
        kind, dashes = ("GPSA", "-") if layer < local else ("plain", "--")
        means = values[:, layer].mean(axis=1)
        panel.plot(epochs, means, color=color, ls=dashes, label=f"{layer + 1} {kind}", **points(epochs))
    rows, columns = (side // model["patch_size"] for side in model["image_size"])
    panel.axhline(patch_distances((rows, columns)).mean(), color=GREY, lw=1, ls=":", label="uniform")
    panel.set(xlabel="epoch", ylabel=f"non-locality (patches, of {rows} x {columns})")
    panel.set_ylim(bottom=0)
    tidy(panel)
    legend(figure, panel, "layer", 1)
    return figure


def draw_gates(epochs, values, model):
    """A Figure of gates [evaluations, GPSA layers, heads]: a panel for each layer, a curve for each head."""
    from matplotlib.figure import Figure

    layers, heads = values.shape[1:]
    columns = min(COLUMNS, layers)
    rows = math.ceil(layers / columns)
    figure = Figure(figsize=(1.4 + 1.3 * columns, 0.7 + 1.5 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for layer, panel in enumerate(panels[:layers]):
        for head, color in enumerate(shades(heads)):
            panel.plot(epochs, values[:, layer, head], color=color, label=f"{head + 1}", **points(epochs))
        panel.plot(epochs, values[:, layer].mean(axis=1), color="black", lw=1.3, ls=(0, (1, 2)), label="mean")
        panel.set(ylim=(-0.02, 1.02), title=f"layer {layer + 1}")
        tidy(panel)
    for number, panel in enumerate(panels[layers:], start=layers):
        panel.remove()
        panels[number - columns].xaxis.set_tick_params(labelbottom=True)
    figure.supxlabel("epoch")
    figure.supylabel("gate $\\sigma(\\lambda)$")
    legend(figure, panels[0], "head", 1 + (heads > 10 * rows))
    return figure


def legend(figure, panel, title, columns):
    """The legend of one panel, to the right of all."""
    place = {"loc": "outside right center", "ncols": columns, "frameon": False}
    figure.legend(*panel.get_legend_handles_labels(), title=title, handlelength=2.4, **place)


def shades(count):
    """So many colours from dark to light, in an order that the colour-blind and a grey print keep."""
    from matplotlib import colormaps

    return colormaps["viridis"](np.linspace(0, 0.88, count))


def points(epochs):
    """How a curve is drawn: where there are few evaluations, each is seen."""
    return {"lw": 1.3, "marker": "o" if len(epochs) <= 12 else None, "ms": 3}


def tidy(panel):
    """Epochs from 0, and a grid."""
    panel.set_xlim(left=0)
    panel.grid(alpha=0.3)
