"""Learning curves of a run directory as a picture."""

from pathlib import Path

from convit_jax.training.metrics import read_metrics

TRAIN, HELD_OUT = "#0072B2", "#D55E00"  # two colours that the colour-blind tell apart


def plot_curves(workdir):
    """Draw metrics.jsonl of a run directory into its curves.png: loss, top-1 and learning rate by epoch.

    Returns the path of the picture.
    """
    from matplotlib.figure import Figure

    workdir = Path(workdir)
    lines = read_metrics(workdir / "metrics.jsonl")
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = figure.subplots(1, 3)
    for panel, title, train, held_out in (
        (panels[0], "loss", "train_loss", "val_loss"),
        (panels[1], "top-1 (%)", "train_top1", "val_top1"),
        (panels[2], "learning rate", "lr", None),
    ):
        for name, label, color, marker in (
            (train, "training", TRAIN, None),
            (held_out, "test", HELD_OUT, "o"),
        ):
            points = [(line["epoch"], line[name]) for line in lines if name in line]
            if points:
                panel.plot(*zip(*points, strict=True), marker=marker, ms=3, lw=1.4, color=color, label=label)
        panel.set(xlabel="epoch", title=title)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
        if held_out and panel.lines:
            panel.legend(frameon=False)
    path = workdir / "curves.png"
    figure.savefig(path, dpi=130)
    return path
