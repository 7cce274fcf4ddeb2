"""Attention maps as figures: one page a kind, a row a layer, a column a head, as PDF and PNG.

Every map of every page has the same scale, logarithmic from uniform attention (1/N, N patches; what is
below is left to the image, faded) to all attention on one patch, so that layers and heads can be compared.
Only untrained content attention, nowhere far from uniform, has a scale of its own. The query is framed.
One sequential palette whose lightness falls all the way, which the colour-blind see too.
"""

import math

import numpy as np
from PIL import Image

from convit_jax.figures.style import COLORS, save

PALETTE = "YlGnBu"
FRAME = COLORS[0]  # of the query: vermilion, apart from every colour of the palette
SIGMA = r"$\sigma(\lambda)$"
FORMULAS = {
    "content": r"softmax($q k / \sqrt{d}$)",
    "position": "softmax($v r$), the same for every image",
}
PIXELS = 112  # of the longer side of a map
FADED = 0.8  # lightness of what is black in the image
BAR, SCALE = 2.6, 3.6  # inches: of a scale's bar, and of its words
GAP, CAPTION, LABEL, MARGIN = 0.07, 0.15, 0.62, 0.15  # inches: between maps, above one, left of a row


class Page:
    """A page laid out in inches, y downwards: one axes on which all maps and words are placed."""

    def __init__(self, width, height):
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(width, height))
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(height, 0))
        self.axes.set_axis_off()

    def words(self, x, y, text, size=7, **style):
        self.axes.text(x, y, text, fontsize=size, **{"va": "center", **style})

    def picture(self, x, y, width, height, pixels, grid, query):
        """An image uint8 [h, w, 3] with a frame around patch `query` (row, column; None: no frame)."""
        from matplotlib.patches import Rectangle
        from matplotlib.patheffects import withStroke

        self.axes.imshow(pixels, extent=(x, x + width, y + height, y), interpolation="none", aspect="auto")
        self.axes.add_patch(Rectangle((x, y), width, height, fill=False, ec="0.6", lw=0.4))
        if query is not None:
            step_y, step_x = height / grid[0], width / grid[1]
            corner = (x + query[1] * step_x, y + query[0] * step_y)
            frame = Rectangle(corner, step_x, step_y, fill=False, ec=FRAME, lw=0.9)
            frame.set_path_effects([withStroke(linewidth=1.8, foreground="white")])
            self.axes.add_patch(frame)

    def scale(self, x, y, width, words, names):
        """The colours' meaning: a bar under a line of words; names: {place in 0..1: what stands below it}."""
        self.words(x, y - 0.11, words, 7.5)
        self.axes.imshow(
            (colours(np.linspace(0, 1, 256)[None]) * 255).astype(np.uint8),
            extent=(x, x + width, y + 0.11, y),
            interpolation="none",
            aspect="auto",
        )
        for place, name in names.items():
            at = x + place * width
            self.axes.plot([at, at], [y + 0.11, y + 0.15], color="black", lw=0.6)
            self.words(at, y + 0.22, name, 6.5, ha="center" if place > 0 else "left")

    def common_scale(self, x, y, patches, *, below, what="Attention"):
        """The bar of `strength`; below: how uniform attention or less looks. what: is drawn on this scale."""
        words = f"{what}, on a logarithmic scale; {below}: uniform (1/{patches}) or less."
        names = {float(strength(value, patches)): f"{100 * value:g} %" for value in (0.01, 0.1, 1)}
        names = {place: name for place, name in names.items() if place * BAR > 0.4}  # apart from the first
        self.scale(x, y, BAR, words, {0.0: f"1/{patches}", **names})


def strength(attention, patches):
    """Attention on the common scale: 0 for 1/N or less, 1 for 1."""
    with np.errstate(divide="ignore"):
        return np.clip(np.log(attention * patches) / np.log(max(patches, 2)), 0, 1)


def colours(values):
    """Colours in 0..1 [..., 3] for values in 0..1."""
    from matplotlib import colormaps

    return np.where(values[..., None] > 0, colormaps[PALETTE](values)[..., :3], 1.0)


def over_image(values, image):
    """A map of values in 0..1 [rows, columns]; where it is 0, the faded image uint8 [H, W, 3] (None: white).

    The image is nowhere under the colours, which are those of the bar.

    Returns:
      uint8, of at most PIXELS a side.
    """
    rows, columns = values.shape
    size = max(2, PIXELS // max(rows, columns))
    values = values.repeat(size, 0).repeat(size, 1)
    pixels = colours(values)
    if image is not None:
        grey = Image.fromarray(image).convert("L").resize((columns * size, rows * size), Image.Resampling.BOX)
        faded = FADED + (1 - FADED) * np.asarray(grey)[..., None] / 255
        pixels = np.where(values[..., None] > 0, pixels, faded)
    return np.round(255 * pixels).astype(np.uint8)


def map_side(rows, columns):
    """Inches of the longer side of a map on a page of rows x columns of them."""
    return min(1.3, max(0.78, min(9 / columns, 13 / rows)))


def draw_page(stem, title, explanation, rows, image, query):
    """Draw one page of maps.

    Args:
      stem: path without its ending. title, explanation: words at the top (explanation: list of lines).
      rows: list of (label, maps [H, rows, columns], captions), the latter one a head.
      image: uint8 [H, W, 3] as the network sees it. query: (row, column) to frame, or None.

    Returns:
      The paths written.
    """
    grid = rows[0][1].shape[1:]
    heads = len(rows[0][1])
    side = map_side(len(rows), heads)
    w, h = side * grid[1] / max(grid), side * grid[0] / max(grid)
    photo = 1.35 / max(grid)
    top = MARGIN + max(1.35 * grid[0] / max(grid), 1.2) + 0.32
    width = max(2 * MARGIN + LABEL + heads * (w + GAP), 6.0)
    page = Page(width, top + len(rows) * (h + CAPTION + GAP) + MARGIN)

    page.picture(MARGIN, MARGIN, photo * grid[1], photo * grid[0], image, grid, query)
    x = 2 * MARGIN + photo * grid[1]
    page.words(x, MARGIN + 0.08, title, 11, weight="bold")
    for number, line in enumerate(explanation):
        page.words(x, MARGIN + 0.32 + 0.15 * number, line, 7.5)
    page.common_scale(x, MARGIN + 0.91, grid[0] * grid[1], below="the faded image")

    for head in range(heads):
        page.words(MARGIN + LABEL + head * (w + GAP) + w / 2, top - 0.1, f"head {head + 1}", 7.5, ha="center")
    for number, (label, maps, captions) in enumerate(rows):
        y = top + number * (h + CAPTION + GAP) + CAPTION
        page.words(MARGIN, y + h / 2, label, 7.5, linespacing=1.3)
        for head, (values, caption) in enumerate(zip(maps, captions, strict=True)):
            x = MARGIN + LABEL + head * (w + GAP)
            page.words(x + w / 2, y - CAPTION / 2 + 0.01, caption, 6.2, ha="center")
            page.picture(x, y, w, h, over_image(strength(values, values.size), image), grid, query)
    return save(page.figure, stem)


def attention_pages(directory, layers, image, query):
    """Draw every page of a model's LayerMaps into a directory; the paths written.

    image: uint8 [H, W, 3] as the network sees it. query: (row, column) of the patch they were made for.
    """
    gated = [layer for layer in layers if layer.gates is not None]
    place = f"row {query[0]}, column {query[1]}"
    framed = f"From the framed patch ({place}, counted from 0) to every patch."
    gate_line = f"{SIGMA}: the gate, the weight of position against content."
    extra = layers[-1].tokens.shape[0]  # class token, and distillation token
    paths = []

    def page(name, title, explanation, rows, query):
        paths.extend(draw_page(directory / name, title, explanation, rows, image, query))

    rows = [(label(n, layer), layer.query, captions_of_query(layer)) for n, layer in enumerate(layers)]
    lines = [f"GPSA: {SIGMA} position + (1 - {SIGMA}) content, {SIGMA} the gate."] if gated else []
    to_tokens = "cls: its attention to the class token" + "; dist: to the distillation token" * (extra == 2)
    lines = [framed, *lines, f"{to_tokens}."]
    page("query", "Attention of a patch", lines, rows, query)
    if gated:
        for part in ("content", "position"):
            rows = [(label(n, layer), getattr(layer, part), gates(layer)) for n, layer in enumerate(gated)]
            lines = [framed, f"The {part} part of GPSA alone: {FORMULAS[part]}.", gate_line]
            page(f"query_{part}", f"{part.title()} part of a patch's attention", lines, rows, query)
    for token, name in enumerate(("class", "distillation")[:extra]):
        rows = [
            (label(n, layer), layer.tokens[token], shares(layer.tokens_tokens[token]))
            for n, layer in enumerate(layers)
            if layer.tokens.shape[0]
        ]
        lines = [f"From the {name} token to every patch.", f"{to_tokens}."]
        page(f"{name}_token", f"Attention of the {name} token", lines, rows, None)
    return paths


def label(number, layer):
    """What stands left of a layer's row."""
    return f"layer {number + 1}\n{'plain' if layer.gates is None else 'GPSA'}"


def gates(layer):
    """The gate of each head, in words."""
    return [f"{SIGMA} {gate:.2f}" for gate in layer.gates]


def captions_of_query(layer):
    """What stands above each head's map of the query: its gate, or what goes to the tokens."""
    return gates(layer) if layer.gates is not None else shares(layer.query_tokens)


def shares(attention):
    """Attention to class (and distillation) token [H, T] in words, one a head."""
    names = ("cls", "dist")
    return [" ".join(f"{n} {a:.2f}" for n, a in zip(names, row, strict=False)) for row in attention]


def init_page(directory, content, positions, strengths, image, query):
    """Draw the attention of a layer before training (Fig. 3) into a directory; the paths written.

    content: [H, rows, columns] or None. positions: one [H, rows, columns] for each of `strengths`; with
    strengths None one of the ordinary init. image: uint8 [H, W, 3], or None. Heads stand as the pixels of
    the k x k filter that they start as; heads beyond it below. Content is drawn from its least to its most
    attention: on the common scale it would be nearly white.
    """
    heads, *grid = positions[0].shape
    k, patches = math.isqrt(heads), grid[0] * grid[1]
    positions = [strength(maps, patches) for maps in positions]
    if strengths is None:
        groups = [("position, ordinary init", positions[0])]
    else:
        groups = [
            (rf"position, $\alpha$ = {a:g}", maps) for a, maps in zip(strengths, positions, strict=True)
        ]
    if content is not None:
        low, high = content.min(), content.max()
        shown = np.maximum((content - low) / max(high - low, 1e-12), 1e-12)  # 0 would be white
        groups.insert(0, ("content, untrained", shown))
    side = min(1.0, 2.6 / k)
    w, h = side * grid[1] / max(grid), side * grid[0] / max(grid)
    lines = math.ceil(heads / k)
    group_w, group_h = k * (w + GAP) - GAP, lines * (h + CAPTION + GAP)
    photo_h = group_w * grid[0] / grid[1] if image is not None else 0
    columns, top, space = len(groups) + (image is not None), MARGIN + 0.95, 0.3
    bars_w = (1 if content is None else 2) * SCALE + 2 * MARGIN
    width = max(2 * MARGIN + columns * (group_w + space) - space, bars_w)
    page = Page(width, top + 0.12 + max(group_h, photo_h + CAPTION) + MARGIN)
    page.words(MARGIN, MARGIN + 0.08, f"{heads} heads of a GPSA layer before training", 11, weight="bold")
    page.common_scale(MARGIN, MARGIN + 0.4, patches, below="white", what="Position")
    if content is not None:
        ends = {place: f"{value * patches:.2f}/{patches}" for place, value in ((0.0, low), (1.0, high))}
        words = "Content, on a linear scale of its own, from its least to its most."
        page.scale(MARGIN + SCALE, MARGIN + 0.4, BAR, words, ends)

    x = MARGIN
    if image is not None:  # as large as a group
        page.words(x, top, "image and query", 8.5)
        page.picture(x, top + 0.12 + CAPTION, group_w, photo_h, image, grid, query)
        x += group_w + space
    for title, maps in groups:
        page.words(x, top, title, 8.5)
        for head, values in enumerate(maps):
            column, row = divmod(head, k) if head < k * k else (head % k, head // k)
            left, upper = x + column * (w + GAP), top + 0.12 + row * (h + CAPTION + GAP)
            page.words(left + w / 2, upper + CAPTION / 2 + 0.01, f"head {head + 1}", 6.2, ha="center")
            page.picture(left, upper + CAPTION, w, h, over_image(values, None), grid, query)
        x += group_w + space
    return save(page.figure, directory / "init")
