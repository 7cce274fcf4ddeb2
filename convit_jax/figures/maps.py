"""Attention maps as figures: one page per kind of map, a row per layer, a column per head.

All maps share a logarithmic scale, from uniform attention (1/N for N patches) to all attention on one patch,
so that layers and heads can be compared. Where attention is below uniform, the faded image is visible.
Content attention before training is nearly uniform and has a linear scale instead. A frame marks the query.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from convit_jax.analysis.maps import LayerMaps
from convit_jax.figures.style import COLORS, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure, SubFigure

TITLES = {
    "query": "Attention of a patch",
    "query_content": "Content part of a patch's attention",
    "query_position": "Position part of a patch's attention",
    "class_token": "Attention of the class token",
    "distillation_token": "Attention of the distillation token",
}
LEGEND = (
    "GPSA: $\\sigma(\\lambda)$ softmax($v r$) + (1 - $\\sigma(\\lambda)$) softmax($q k / \\sqrt{d}$), "
    "position and content.\ncls, dist: attention to the class token and the distillation token."
)
PIXELS, GAP, CAPTION = 112, 9, 22  # of the longer side of a map, between maps, and above a map

Query = tuple[int, int] | None
Cells = Mapping[tuple[int, int], tuple[np.ndarray, str]]  # map and caption by row and column
Row = tuple[str, np.ndarray, Sequence[str]]  # layer, its maps [heads, rows, columns], a caption per head


def draw_attention_maps(
    directory: Path, layers: Sequence[LayerMaps], image: np.ndarray, query: tuple[int, int]
) -> list[Path]:
    """Draws the attention of every layer and head.

    Args:
      directory: where to write the pages query, query_content, query_position, class_token and
        distillation_token, as far as the model has them.
      layers: maps of all layers.
      image: uint8 [H, W, 3], as the network sees it.
      query: (row, column) of the patch for which the maps were computed.

    Returns:
      The paths written.
    """
    pages: dict[str, list[Row]] = {name: [] for name in TITLES}
    for number, layer in enumerate(layers, 1):
        name, captions = f"layer {number}\nplain", _shares(layer.query_tokens)
        if layer.gates is not None:
            name = f"layer {number}\nGPSA"
            captions = [f"\u03c3(\u03bb) {gate:.2f}" for gate in layer.gates]  # formulas take long to draw
            for part in ("content", "position"):
                pages[f"query_{part}"].append((name, getattr(layer, part), captions))
        pages["query"].append((name, layer.query, captions))
        of_tokens = zip(layer.tokens, layer.tokens_tokens, strict=True)
        for page, (maps, to_tokens) in zip(("class_token", "distillation_token"), of_tokens, strict=False):
            pages[page].append((name, maps, _shares(to_tokens)))
    paths = []
    for page, rows in pages.items():
        if rows:
            framed = None if page.endswith("token") else query
            paths += save_figure(_plot_page(TITLES[page], rows, image, framed), directory, page)
    return paths


def _shares(attention: np.ndarray) -> list[str]:
    """Captions with the attention [heads, tokens] of each head to class token and distillation token."""
    names = ("cls", "dist")
    return [" ".join(f"{n} {share:.2f}" for n, share in zip(names, head, strict=False)) for head in attention]


def _plot_page(title: str, rows: Sequence[Row], image: np.ndarray, query: Query) -> "Figure":
    """The image, words and the colour bar, and below them the maps."""
    from matplotlib.figure import Figure

    heads, *grid = rows[0][1].shape
    step = _step(grid)
    inch = min(1.3, max(0.78, min(9 / heads, 13 / len(rows)))) / PIXELS
    width, height = max(0.7 + heads * step[1] * inch, 6.0), 0.3 + len(rows) * step[0] * inch
    figure = Figure(figsize=(width, 1.6 + height), layout="constrained")
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=(1.6, height))[:, 0]

    photo, words = top.subplots(1, 2, width_ratios=(1.5, width - 1.5))
    photo.imshow(image, extent=(0, grid[1], grid[0], 0))
    photo.set_axis_off()
    _frame(photo, 0, 0, 1, query)
    words.set_axis_off()
    words.set_title(title, loc="left", fontsize=11, fontweight="bold")
    start = f"From the framed patch, row {query[0]}, column {query[1]} (from 0).\n" if query else ""
    style = {"fontsize": 7.5, "va": "top", "linespacing": 1.4}
    words.text(0, 1, start + LEGEND, transform=words.transAxes, **style)
    label = f"attention; the faded image: uniform (1/{math.prod(grid)}) or less"
    bar = words.inset_axes((0, 0.25, 2.6 / (width - 1.6), 0.1))
    _add_colorbar(top, _common_norm(grid), label, cax=bar)

    axes = bottom.subplots()
    cells = {
        (n, head): (maps[head], captions[head]) for n, (_, maps, captions) in enumerate(rows) for head in range(heads)
    }
    _draw_maps(axes, cells, _common_norm(grid), query, image)
    axes.set_xticks([n * step[1] + step[1] / 2 for n in range(heads)], [f"head {n + 1}" for n in range(heads)])
    axes.set_yticks([n * step[0] + step[0] / 2 for n in range(len(rows))], [name for name, _, _ in rows])
    axes.tick_params(length=0, labelsize=7.5, labeltop=True, labelbottom=False)
    return figure


def draw_init_maps(
    directory: Path,
    content: np.ndarray | None,
    positions: Sequence[np.ndarray],
    strengths: Sequence[float] | None,
    image: np.ndarray | None,
    query: tuple[int, int],
) -> list[Path]:
    """Draws the attention of a GPSA layer before training (Fig. 3).

    The heads are placed like the pixels of the k x k filter that they start as, any others below.

    Args:
      directory: where to write init.png and init.pdf.
      content: [heads, rows, columns], or None.
      positions: [heads, rows, columns] for each locality strength.
      strengths: of the convolutional init; None if `positions` is one ordinary init.
      image: uint8 [H, W, 3], as the network sees it, or None.
      query: (row, column) of the patch for which the maps were computed.

    Returns:
      The paths written.
    """
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    heads, *grid = positions[0].shape
    names = [rf"position, $\alpha$ = {a:g}" for a in strengths] if strengths else ["position, ordinary init"]
    panels = int(image is not None) + int(content is not None) + len(positions)
    figure = Figure(figsize=(max(2.8 * panels, 3.4), 0.9 + 2.9 * grid[0] / grid[1]), layout="constrained")
    figure.suptitle(f"{heads} heads of a GPSA layer before training", x=0.01, ha="left", weight="bold")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    if image is not None:
        photo = axes.pop(0)
        photo.imshow(image, extent=(0, grid[1], grid[0], 0))
        photo.set_title("image and query", fontsize=8.5)
        photo.set_axis_off()
        _frame(photo, 0, 0, 1, query)
    if content is not None:
        norm = Normalize(content.min(), content.max())
        _draw_maps(axes[0], _as_filter(content), norm, query)
        axes[0].set_title("content, untrained", fontsize=8.5)
        _add_colorbar(figure, norm, "attention", ax=axes.pop(0), shrink=0.9)
    for each, name, maps in zip(axes, names, positions, strict=True):
        _draw_maps(each, _as_filter(maps), _common_norm(grid), query)
        each.set_title(name, fontsize=8.5)
    _add_colorbar(
        figure,
        _common_norm(grid),
        f"attention; white: uniform (1/{math.prod(grid)}) or less",
        ax=axes,
        shrink=0.9 / len(axes),
    )
    for each in figure.axes[:panels]:
        each.set(xticks=[], yticks=[])
    return save_figure(figure, directory, "init")


def _as_filter(maps: np.ndarray) -> Cells:
    """Places the maps of k x k heads column by column, as the filter is laid out, and others below."""
    k = math.isqrt(len(maps))
    places = [(n % k, n // k) if n < k * k else (n // k, n % k) for n in range(len(maps))]
    return {place: (values, f"head {n}") for n, (place, values) in enumerate(zip(places, maps, strict=True), 1)}


def _draw_maps(axes: "Axes", cells: Cells, norm: "Normalize", query: Query, image: np.ndarray | None = None) -> None:
    """Draws maps into axes whose unit is a pixel, all in one picture because many are slow."""
    from matplotlib.patches import Rectangle

    grid = next(iter(cells.values()))[0].shape
    patch, (step_y, step_x) = _patch(grid), _step(grid)
    height, width = grid[0] * patch, grid[1] * patch
    rows, columns = (1 + max(each) for each in zip(*cells, strict=True))
    pixels = np.full((rows * step_y, columns * step_x, 3), 255, np.uint8)
    background = np.array(255)
    if image is not None:  # black becomes a light grey
        grey = Image.fromarray(image).convert("L").resize((width, height), Image.Resampling.BOX)
        background = 204 + np.asarray(grey)[..., None] // 5
    for (row, column), (values, caption) in cells.items():
        left, top = column * step_x, row * step_y
        colors = _palette()(norm(values), bytes=True).repeat(patch, 0).repeat(patch, 1)
        shown = np.where(colors[..., 3:] > 0, colors[..., :3], background)
        pixels[top : top + height, left : left + width] = shown
        axes.add_patch(Rectangle((left, top), width, height, fill=False, ec="0.6", lw=0.4))
        axes.text(left + width / 2, top - 5, caption, fontsize=6.2, ha="center", in_layout=False)
        _frame(axes, left, top, patch, query)
    axes.imshow(pixels, extent=(0, columns * step_x, rows * step_y, 0), interpolation="none")
    axes.set_ylim(rows * step_y, -CAPTION)
    axes.spines[:].set_visible(False)


def _frame(axes: "Axes", left: float, top: float, patch: float, query: Query) -> None:
    """Marks the query, in a colour that the palette does not have."""
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    if query is not None:
        outline = [withStroke(linewidth=1.8, foreground="white")]
        corner = left + query[1] * patch, top + query[0] * patch
        axes.add_patch(Rectangle(corner, patch, patch, fill=False, ec=COLORS[0], lw=0.9, path_effects=outline))


def _patch(grid: Sequence[int]) -> int:
    """Pixels of a patch."""
    return max(1, PIXELS // max(grid))


def _step(grid: Sequence[int]) -> tuple[int, int]:
    """Pixels (down, across) from one map to the next."""
    return grid[0] * _patch(grid) + CAPTION + GAP, grid[1] * _patch(grid) + GAP


def _common_norm(grid: Sequence[int]) -> "Normalize":
    """The logarithmic scale from 1/N to 1."""
    from matplotlib.colors import LogNorm

    return LogNorm(1 / math.prod(grid), 1)


def _palette() -> "Colormap":
    """Colours that only get darker, for colour-blind readers and grey prints; transparent below the scale."""
    from matplotlib import colormaps

    return colormaps["YlGnBu"].with_extremes(under=(1, 1, 1, 0))


def _add_colorbar(figure: "SubFigure | Figure", norm: "Normalize", label: str, **place: Any) -> None:
    """Adds a horizontal colour bar in per cent of attention."""
    from matplotlib.cm import ScalarMappable

    low, high = float(norm.vmin or 0), float(norm.vmax or 1)
    ticks = [low, *(value for value in (0.01, 0.1) if 1.5 * low < value < high), high]
    scale = ScalarMappable(norm, _palette())
    bar = figure.colorbar(scale, orientation="horizontal", ticks=ticks, **place)
    bar.set_ticks(ticks, labels=[f"{100 * value:.3g} %" for value in ticks])
    bar.minorticks_off()
    bar.ax.tick_params(labelsize=6.5)
    bar.set_label(label, fontsize=7.5)
