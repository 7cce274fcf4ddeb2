"""The look of all figures, and the one function that writes them."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure

from convit_jax.errors import UserError
from convit_jax.rundir import atomic_write

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def tidy_axes(axes: Axes) -> None:
    """Adds a light grid and removes the upper and right edges."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def add_title(figure: Figure, text: str) -> None:
    """Adds a bold title at the left, small enough for the figure's width."""
    size = min(11, 100 * figure.get_figwidth() / len(text))
    figure.suptitle(text, x=0.01, ha="left", fontweight="bold", fontsize=size)


def check_picture(path: Path) -> None:
    """Raises UserError if the name of a picture says no format that can be written."""
    known = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:] not in known:
        raise UserError(f"{path} is not the name of a picture: end it in .png or .pdf.")


def save_figure(figure: Figure, directory: Path, name: str, kinds: Sequence[str] = ("png", "pdf")) -> list[Path]:
    """Writes directory/name.KIND for each kind; returns the paths. UserError if it cannot."""
    paths = [directory / f"{name}.{kind}" for kind in kinds]
    for path, kind in zip(paths, kinds, strict=True):
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with rc_context({"pdf.fonttype": 42}), atomic_write(path, "wb") as file:
                figure.savefig(file, format=kind, dpi=160)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot write the picture {path} ({error}): use another output path.") from error
    return paths
