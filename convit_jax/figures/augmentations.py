"""Training images after augmentation, as one picture."""

from pathlib import Path

from matplotlib.figure import Figure

from convit_jax.figures.style import save_figure
from convit_jax.training.preview import Pictures


def draw_augmentations(path: Path, pictures: Pictures) -> list[Path]:
    """Draws what `preview_augmentation` returns into one file, whose ending is the format."""
    rows, columns = len(pictures), len(pictures[0])
    figure = Figure(figsize=(1.4 * columns, 1.7 * rows + 0.3), layout="constrained")
    figure.suptitle("Images to train on, after augmentation and mixing", fontsize=12)
    panels = figure.subplots(rows, columns, squeeze=False)
    for step, (row, of_row) in enumerate(zip(pictures, panels, strict=True)):
        of_row[0].set_ylabel(f"step {step}", fontsize=9)
        for (image, caption), axes in zip(row, of_row, strict=True):
            axes.imshow(image, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            axes.set_title(caption, fontsize=7.5, linespacing=1.1)
    return save_figure(figure, path.parent, path.stem, [path.suffix[1:]])
