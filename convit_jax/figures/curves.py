"""Learning curves of a training, from its log: loss, top-1 and learning rate by epoch."""

from convit_jax.figures.style import COLORS, STYLE, save
from convit_jax.rundir import read_metrics

HELD_OUT, TRAIN, AVERAGED = COLORS[:3]


def draw_curves(run, directory):
    """Draw metrics.jsonl of a run directory into another, or the same; the paths of curves.png and .pdf."""
    from matplotlib import rc_context

    with rc_context(STYLE):
        return save(curves(read_metrics(run / "metrics.jsonl")), directory / "curves")


def curves(lines):
    """A Figure of the lines of a log."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = figure.subplots(1, 3)
    for panel, title, train, held_out in (
        (panels[0], "loss", "train_loss", "loss"),
        (panels[1], "top-1 (%)", "train_top1", "top1"),
        (panels[2], "learning rate", "lr", None),
    ):
        for name, label, color, marker in (
            (train, "training", TRAIN, None),
            (f"val_{held_out}", "test", HELD_OUT, "o"),
            (f"val_ema_{held_out}", "test, EMA of the weights", AVERAGED, "s"),
        ):
            points = [(line["epoch"], line[name]) for line in lines if name in line]
            if points:
                panel.plot(*zip(*points, strict=True), marker=marker, ms=3, lw=1.4, color=color, label=label)
        panel.set(xlabel="epoch", title=title)
        panel.grid(alpha=0.3)
        if held_out and panel.lines:
            panel.legend(frameon=False)
    return figure
