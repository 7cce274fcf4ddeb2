"""Attention maps as figures: one page per kind of map, a row per layer, a column per head.

All maps share a logarithmic scale, from uniform attention (1/N for N patches) to all attention on one patch,
so that layers and heads can be compared. Where attention is uniform or less, the faded image is visible.
Content attention before training is nearly uniform and has a linear scale instead. A frame marks the query.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import PercentFormatter
from PIL import Image

from convit_jax.analysis.maps import LayerMaps
from convit_jax.figures.style import COLORS, add_title, save_figure

TITLES = {
    "query": "Attention of a patch",
    "query_content": "Content part of a patch's attention",
    "query_position": "Position part of a patch's attention",
    "class_token": "Attention of the class token",
    "distillation_token": "Attention of the distillation token",
}
PAGE = 7.5, 10.5  # inches, at most; the other way round for few layers
GAP, CAPTION = 0.08, 0.2  # between maps and above a map, of the longer side of a map

Query = tuple[int, int] | None
Cells = Mapping[tuple[int, int], tuple[np.ndarray, str]]  # map and caption by row and column
Row = tuple[str, np.ndarray, Sequence[str]]  # layer, its maps [heads, rows, columns], a caption per head


def draw_attention_maps(
    directory: Path, layers: Mapping[int, LayerMaps], image: np.ndarray, grid: tuple[int, int], query: tuple[int, int]
) -> list[Path]:
    """Draws the pages of TITLES that some layers by number have, for a uint8 image [H, W, 3]; returns the paths.

    The query is the (row, column) of a patch in the grid.
    """
    pages: dict[str, list[Row]] = {name: [] for name in TITLES}
    patch = query[0] * grid[1] + query[1]
    for number, layer in layers.items():
        attention = layer.attention
        tokens = attention.shape[1] - math.prod(grid)
        shares, maps = attention[:, :, :tokens], attention[:, :, tokens:].reshape(len(attention), -1, *grid)
        name, captions = f"layer {number}\nplain", _shares(shares[:, tokens + patch])
        if layer.gates is not None:
            name = f"layer {number}\nGPSA"
            captions = [f"\u03c3(\u03bb) {gate:.2f}" for gate in layer.gates]  # formulas take long to draw
            for part, values in (("content", layer.content), ("position", layer.position)):
                pages[f"query_{part}"].append((name, values[:, patch].reshape(-1, *grid), captions))
        pages["query"].append((name, maps[:, tokens + patch], captions))
        for token, page in enumerate(("class_token", "distillation_token")[:tokens]):
            pages[page].append((name, maps[:, token], _shares(shares[:, token])))
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


def _plot_page(title: str, rows: Sequence[Row], image: np.ndarray, query: Query) -> Figure:
    """The image above the maps, or to the left of them if there are few layers."""
    heads, *grid = rows[0][1].shape
    norm = LogNorm(1 / math.prod(grid), 1)
    down, across = _steps(grid)
    width, height = heads * across, len(rows) * down  # of the maps, in patches
    wide = width >= 2 * height
    page, around = (PAGE[::-1], (3.1, 1.7)) if wide else (PAGE, (0.7, 2.7))  # inches
    inch = min(1.3 / max(grid), (page[0] - around[0]) / width, (page[1] - around[1]) / height)  # of a patch
    size = max(around[0] + width * inch, 4.0), max(around[1] + height * inch, 2.6)
    figure = Figure(figsize=size, layout="constrained")
    add_title(figure, title + (f" (row {query[0]}, column {query[1]})" if query else ""))
    if wide:
        photo, axes = figure.subplots(1, 2, width_ratios=(2.2, size[0] - 2.4))
    else:
        photo, axes = figure.subplots(2, 1, height_ratios=(1.4, size[1] - 2.4))
    photo.set_anchor("W")
    _draw_photo(photo, image, grid, query)
    cells = {(n, head): (maps[head], texts[head]) for n, (_, maps, texts) in enumerate(rows) for head in range(heads)}
    _draw_maps(axes, cells, norm, query, image)
    axes.set_xticks([n * across + grid[1] / 2 for n in range(heads)], ["head 1", *range(2, heads + 1)])
    axes.set_yticks([n * down + grid[0] / 2 for n in range(len(rows))], [name for name, _, _ in rows])
    axes.tick_params(length=0, labelsize=7.5, labeltop=True, labelbottom=False)
    label = f"attention; the faded image: uniform (1/{math.prod(grid)}) or less"
    _add_colorbar(figure, [axes], norm, label)
    return figure


def draw_init_maps(
    directory: Path,
    content: np.ndarray | None,
    positions: Mapping[float | None, np.ndarray],
    image: np.ndarray | None,
    query: tuple[int, int],
) -> list[Path]:
    """Draws what `init_maps` returns (Fig. 3), for a uint8 image [H, W, 3] or None; returns the paths."""
    heads, *grid = next(iter(positions.values())).shape
    norm = LogNorm(1 / math.prod(grid), 1)
    panels = (image is not None) + (content is not None) + len(positions)
    figure = Figure(figsize=(max(2.1 * panels, 3.4), 0.9 + 2.1 * grid[0] / grid[1]), layout="constrained")
    add_title(figure, f"{heads} heads of a GPSA layer before training")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    if image is not None:
        _draw_photo(axes.pop(0), image, grid, query)
    if content is not None:
        linear = Normalize(content.min(), content.max())
        axes[0].set_title("content, untrained", fontsize=8.5)
        _draw_maps(axes[0], _as_filter(content), linear, query)
        _add_colorbar(figure, [axes.pop(0)], linear, "attention")
    for each, (strength, maps) in zip(axes, positions.items(), strict=True):
        init = "ordinary init" if strength is None else rf"$\alpha$ = {strength:g}"
        each.set_title(f"position, {init}", fontsize=8.5)
        _draw_maps(each, _as_filter(maps), norm, query)
    _add_colorbar(figure, axes, norm, f"attention; white: uniform (1/{math.prod(grid)}) or less")
    return save_figure(figure, directory, "init")


def _as_filter(maps: np.ndarray) -> Cells:
    """Places the maps of k x k heads as the pixels of the filter that they start as, and others below."""
    k = math.isqrt(len(maps))
    places = [(n % k, n // k) if n < k * k else (n // k, n % k) for n in range(len(maps))]
    return {place: (values, f"head {n}") for n, (place, values) in enumerate(zip(places, maps, strict=True), 1)}


def _draw_photo(axes: Axes, image: np.ndarray, grid: Sequence[int], query: Query) -> None:
    axes.imshow(image, extent=(0, grid[1], grid[0], 0))
    axes.set_axis_off()
    _frame(axes, 0, 0, query)


def _draw_maps(axes: Axes, cells: Cells, norm: Normalize, query: Query, image: np.ndarray | None = None) -> None:
    """Draws maps into axes whose unit is a patch, all in one picture because many are slow."""
    height, width = next(iter(cells.values()))[0].shape
    down, across = _steps((height, width))
    rows, columns = (1 + max(each) for each in zip(*cells, strict=True))
    canvas = np.full((rows * down, columns * across), np.nan)
    for (row, column), (values, caption) in cells.items():
        left, top = column * across, row * down
        canvas[top : top + height, left : left + width] = values
        axes.add_patch(Rectangle((left, top), width, height, fill=False, ec="0.6", lw=0.4))
        axes.text(
            left + width / 2, top - 0.3, caption, fontsize=72 / max(12, len(caption)), ha="center", in_layout=False
        )
        _frame(axes, left, top, query)
    extent = (0, columns * across, rows * down, 0)
    if image is not None:
        cell = Image.new("L", (8 * across, 8 * down), 255)
        cell.paste(faded(image, (height, width)))
        axes.imshow(np.tile(np.asarray(cell), (rows, columns)), cmap="gray", vmin=0, vmax=255, extent=extent)
    axes.imshow(canvas, cmap=palette(), norm=norm, extent=extent, interpolation="none")
    axes.set(ylim=(rows * down, -max(1, round(CAPTION * max(height, width)))), xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def faded(image: np.ndarray, grid: Sequence[int]) -> Image.Image:
    """Returns a uint8 image [H, W, 3] as the background of a map: 8 pixels a patch, black is a light grey."""
    return Image.fromarray(image).convert("L").resize((8 * grid[1], 8 * grid[0])).point(lambda grey: 204 + grey // 5)


def palette() -> ListedColormap:
    """Colours that only get darker, for colour-blind readers and grey prints; they fade in from the image behind."""
    colors = colormaps["YlGnBu"](np.linspace(0, 1, 256))
    colors[:, 3] = np.minimum(1, np.linspace(0, 3, 256))
    return ListedColormap(colors)


def _frame(axes: Axes, left: float, top: float, query: Query) -> None:
    """Marks the query, in a colour that the palette does not have."""
    if query is not None:
        outline = [withStroke(linewidth=1.8, foreground="white")]
        corner = left + query[1], top + query[0]
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, ec=COLORS[0], lw=0.9, path_effects=outline))


def _steps(grid: Sequence[int]) -> tuple[int, int]:
    """Patches (down, across) from one map to the next."""
    gap, caption = (max(1, round(share * max(grid))) for share in (GAP, CAPTION))
    return grid[0] + caption + gap, grid[1] + gap


def _add_colorbar(figure: Figure, axes: Sequence[Axes], norm: Normalize, label: str) -> None:
    """Adds the horizontal colour bar of maps below them."""
    colors, shrink = ScalarMappable(norm, palette()), 0.9 / len(axes)
    bar = figure.colorbar(
        colors, ax=axes, orientation="horizontal", shrink=shrink, aspect=40, format=PercentFormatter(1)
    )
    bar.minorticks_off()
    bar.ax.tick_params(labelsize=6.5)
    bar.set_label(label, fontsize=7.5)
