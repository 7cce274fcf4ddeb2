"""How local attention was in the course of a training, from the log in its run directory.

Non-locality of each layer by epoch (ConViT, Fig. 5), and the gates sigma(lambda) of the heads of each GPSA
layer by epoch (Fig. 6). Layers and heads are counted from 1, as in the paper.
"""

import json
import math
from pathlib import Path

import numpy as np

from convit_jax.analysis.locality import patch_distances
from convit_jax.errors import UserError
from convit_jax.models.variants import model_settings
from convit_jax.training.metrics import read_metrics

COLUMNS = 5  # panels in a row
GREY = "0.45"
STYLE = {"font.size": 8, "axes.titlesize": 8, "axes.labelsize": 9, "figure.labelsize": 9, "pdf.fonttype": 42}


def draw_locality(run_directory, output_directory):
    """Draw what a training has logged of its attention.

    Args:
      run_directory: of train.py, finished or not. output_directory: a folder, made if it is not there.

    Returns:
      The pictures' paths: nonlocality and, of a model with GPSA, gates; each as .png and as .pdf.

    Raises:
      UserError: nothing of it was logged, or the pictures cannot be written.
    """
    from matplotlib import rc_context

    run, output = Path(run_directory).expanduser(), Path(output_directory).expanduser()
    lines = read_metrics(run / "metrics.jsonl")
    paths = []
    for name, draw in (("nonlocality", draw_nonlocality), ("gates", draw_gates)):
        found = [line for line in lines if name in line]
        if not found:
            continue
        with rc_context(STYLE):
            figure = draw(
                [line["epoch"] for line in found], np.array([line[name] for line in found]), model_of(run)
            )
            paths += save(figure, output / name)
    if not paths:
        raise UserError(
            f"{run} has logged neither non-locality nor gates: give the directory of a run that has come to "
            "an evaluation."
        )
    return paths


def save(figure, path):
    """Write a figure beside a path without ending, as .png and as .pdf; both paths."""
    paths = [path.with_name(f"{path.name}.{ending}") for ending in ("png", "pdf")]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for each in paths:
            figure.savefig(each, dpi=200)
    except OSError as error:
        raise UserError(f"cannot write into {path.parent} ({error}): give another --output.") from error
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
    """Epochs from 0, a grid and no box."""
    panel.set_xlim(left=0)
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)


def model_of(run):
    """The settings of a run's VisionTransformer, without the number of classes."""
    model = json.loads((run / "config.json").read_text())["model"]
    given = {name: value for name, value in model.items() if value is not None}
    return model_settings(**given)
