"""Training images after augmentation, as one picture."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure, SubFigure

from convit_jax.figures.style import save_figure

Pictures = list[list[tuple[np.ndarray, str]]]  # rows of images, in 0..1 or 0..255, with captions


def draw_augmentations(path: Path, crops: Pictures, mixed: Pictures) -> list[Path]:
    """Draws what `preview_augmentation` returns into one file, whose ending is the format."""
    size = 1.4 * len(crops[0]), 1.7 * (len(crops) + len(mixed))
    figure = Figure(figsize=size, layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(len(crops), len(mixed)))[:, 0]
    _draw_rows(above, "Crops of images after augmentation", "image", crops)
    _draw_rows(below, "The first steps with a batch of these crops, after mixing", "step", mixed)
    return save_figure(figure, path.parent, path.stem, [path.suffix[1:]])


def _draw_rows(figure: SubFigure, title: str, row_name: str, rows: Pictures) -> None:
    figure.suptitle(title, fontsize=12)
    panels = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for number, (row, of_row) in enumerate(zip(rows, panels, strict=True)):
        of_row[0].set_ylabel(f"{row_name} {number}", fontsize=9)
        for (image, caption), axes in zip(row, of_row, strict=True):
            axes.imshow(image, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            axes.set_title(caption, fontsize=7.5, linespacing=1.1)
