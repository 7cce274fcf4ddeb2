"""Pillow's pixel operations on uint8 batches inside jit: lookup tables, affine warp, blends.

Each operation rounds, truncates and clips as Pillow's C code does, so tables and blends give exactly its
pixels. The warp uses float32 where Pillow uses double. Images are uint8 [B, H, W, 3], settings have one row for each.
Tables, uint8 [B, 256, 3], map each value of each channel to its new value.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp


def look_up(images: jax.Array, tables: jax.Array) -> jax.Array:
    """Returns the images with each value replaced by its entry in the tables (`Image.point`)."""
    flat = images.reshape(images.shape[0], -1, 3).astype(jnp.int32)
    return jnp.take_along_axis(tables, flat, axis=1, mode="promise_in_bounds").reshape(images.shape)


def autocontrast_tables(images: jax.Array) -> jax.Array:
    """Returns tables that stretch each channel from its extremes to 0..255 (`ImageOps.autocontrast`)."""
    low, high = images.min((1, 2))[:, None], images.max((1, 2))[:, None]  # [B, 1, 3]
    values = jnp.arange(256, dtype=jnp.uint8)[:, None]
    # Where 255 (value - low) / (high - low) is an integer, the last bit of Pillow's doubles decides how it is
    # truncated, so this needs doubles too. The maximum with 0 changes no value; it keeps compilers from
    # fusing the product and the sum into one rounding.
    with jax.enable_x64(True):
        low64, high64, values64 = (x.astype(jnp.float64) for x in (low, high, values))
        scale = 255.0 / jnp.maximum(high64 - low64, 1.0)
        offset = jnp.maximum(low64 * scale, 0.0)
        stretched = jnp.maximum(values64 * scale, 0.0) - offset
        stretched = jnp.clip(stretched, 0.0, 255.0).astype(jnp.uint8)
    return jnp.where(high > low, stretched, values)


def equalize_tables(images: jax.Array) -> jax.Array:
    """Returns tables that flatten the histogram of each channel (`ImageOps.equalize`)."""

    def histogram(image: jax.Array) -> jax.Array:
        values = image.reshape(-1, 3).astype(jnp.int32)
        return jnp.zeros((256, 3), jnp.int32).at[values, jnp.arange(3)].add(1, mode="promise_in_bounds")

    counts = jax.vmap(histogram)(images)
    darker = jnp.cumsum(counts, axis=1) - counts  # pixels below each value
    # Pillow excludes the pixels of the brightest value from its step.
    step = jnp.max(jnp.where(counts > 0, darker, 0), axis=1, keepdims=True) // 255
    equalized = jnp.minimum((step // 2 + darker) // jnp.maximum(step, 1), 255)
    return jnp.where(step > 0, equalized, jnp.arange(256)[:, None]).astype(jnp.uint8)


def warp(images: jax.Array, matrices: jax.Array, fill: Sequence[int]) -> jax.Array:
    """Returns the images after `Image.transform(AFFINE, BICUBIC)`, with a fill colour for pixels from outside.

    matrices are [[a, b, c], [d, e, f]], float32 [B, 2, 3]: the pixel at (x, y) comes from (a x + b y + c, d x + e y
    + f), in pixels from the centre. Pillow's cubic is Keys' with a = -1, border repeated, truncated.
    """
    height, width = images.shape[1:3]
    # One 32-bit word for a pixel: the sixteen lookups then fetch all channels at once.
    words = jax.lax.bitcast_convert_type(jnp.pad(images, ((0, 0),) * 3 + ((0, 1),)), jnp.uint32)
    fill_word = fill[0] | fill[1] << 8 | fill[2] << 16
    y = jnp.arange(height, dtype=jnp.float32)[:, None] + 0.5 - height / 2
    x = jnp.arange(width, dtype=jnp.float32) + 0.5 - width / 2

    def one(words: jax.Array, matrix: jax.Array) -> jax.Array:
        from_x = matrix[0, 0] * x + matrix[0, 1] * y + matrix[0, 2] + width / 2
        from_y = matrix[1, 0] * x + matrix[1, 1] * y + matrix[1, 2] + height / 2
        inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
        left, top = jnp.floor(from_x - 0.5), jnp.floor(from_y - 0.5)
        dx, dy = from_x - 0.5 - left, from_y - 0.5 - top
        columns = [jnp.clip(left.astype(jnp.int32) + n, 0, width - 1) for n in (-1, 0, 1, 2)]
        lines = [jnp.clip(top.astype(jnp.int32) + n, 0, height - 1) * width for n in (-1, 0, 1, 2)]
        flat = words.reshape(-1)
        taps = [[flat.at[line + column].get(mode="promise_in_bounds") for column in columns] for line in lines]
        word = jnp.zeros((), jnp.uint32)
        for shift in (0, 8, 16):
            rows = [_cubic([(tap >> shift & 255).astype(jnp.float32) for tap in row], dx) for row in taps]
            word |= jnp.clip(_cubic(rows, dy), 0, 255).astype(jnp.uint32) << shift
        return jnp.where(inside, word, jnp.uint32(fill_word))

    return jax.lax.bitcast_convert_type(jax.vmap(one)(words, matrices), jnp.uint8)[..., :3]


def _cubic(values: Sequence[jax.Array], d: jax.Array) -> jax.Array:
    """Pillow's cubic through four neighbours, at distance d from the second, in its order of operations."""
    v1, v2, v3, v4 = values
    return v2 + d * ((v3 - v1) + d * ((2 * (v1 - v2) + v3 - v4) + d * (v2 - v1 + v4 - v3)))


def blend(degenerate: jax.Array | int, images: jax.Array, factor: jax.Array) -> jax.Array:
    """Returns `Image.blend(degenerate, image, factor)`, on which `ImageEnhance` is built.

    degenerate: integers that broadcast against the images; factor: float32 [B], 1 gives the image.
    """
    images, degenerate = images.astype(jnp.int32), jnp.asarray(degenerate).astype(jnp.int32)
    difference = images - degenerate
    # Pillow rounds the product before it adds. The maximum with 0 changes no value; it keeps compilers from
    # fusing the two operations.
    size = jnp.maximum(factor[:, None, None, None] * jnp.abs(difference).astype(jnp.float32), 0.0)
    mixed = degenerate.astype(jnp.float32) + jnp.where(difference < 0, -size, size)
    return jnp.clip(mixed, 0.0, 255.0).astype(jnp.uint8)


def grey(images: jax.Array) -> jax.Array:
    """Returns the luminance (`Image.convert("L")`), int32 [B, H, W, 1]."""
    red, green, blue = (images[..., c : c + 1].astype(jnp.int32) for c in range(3))
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def mean_grey(images: jax.Array) -> jax.Array:
    """Returns the rounded mean luminance of each image (`ImageEnhance.Contrast`), int32 [B, 1, 1, 1]."""
    pixels = images.shape[1] * images.shape[2]
    total = jnp.sum(grey(images), axis=(1, 2, 3), keepdims=True)
    return (2 * total + pixels) // (2 * pixels)


def smooth(images: jax.Array) -> jax.Array:
    """Returns the images after `ImageFilter.SMOOTH`, int32: weight 5, neighbours 1; the border does not change."""
    height, width = images.shape[1:3]
    images = images.astype(jnp.int32)
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    nine = sum(padded[:, y : y + height, x : x + width] for y in range(3) for x in range(3))
    y, x = jnp.arange(height)[:, None, None], jnp.arange(width)[:, None]
    inner = (y > 0) & (y < height - 1) & (x > 0) & (x < width - 1)
    return jnp.where(inner, (2 * (nine + 4 * images) + 13) // 26, images)  # round(sum / 13), which never ties


def gaussian_blur(images: jax.Array, sigma: jax.Array) -> jax.Array:
    """Blurs images with sigma in pixels, float32 [B]; weights are normalised over the pixels inside the image."""

    def weights(size: int) -> jax.Array:
        pixels = jnp.arange(size, dtype=jnp.float32)
        distance = pixels[:, None] - pixels
        return jax.nn.softmax(-0.5 * (distance / sigma[:, None, None]) ** 2, axis=-1)

    height, width = images.shape[1:3]
    exact = jax.lax.Precision.HIGHEST
    blurred = jnp.einsum("byi,bixc->byxc", weights(height), images.astype(jnp.float32), precision=exact)
    blurred = jnp.einsum("bxj,byjc->byxc", weights(width), blurred, precision=exact)
    return jnp.round(blurred).astype(jnp.uint8)


def some_rows(function: Callable[..., jax.Array], wanted: jax.Array, *batch: jax.Array) -> jax.Array:
    """Returns function(*batch), row by row, in the wanted rows (bool [B]) at about their cost; others are undefined.

    Round n works on the n-th wanted row of each group of sixteen neighbours, until no group has wanted rows
    left. No row leaves its device if a device's share is a multiple of sixteen.
    """
    group = math.gcd(wanted.shape[0], 16)
    wanted, *groups = (x.reshape(-1, group, *x.shape[1:]) for x in (wanted, *batch))
    order = jnp.argsort(~wanted, axis=1)  # the wanted rows of each group first
    rounds = jnp.max(jnp.sum(wanted, axis=1))

    def pick(rows: jax.Array, at: jax.Array) -> jax.Array:
        at = at.reshape(*at.shape, *(1,) * (rows.ndim - 2))
        return jnp.take_along_axis(rows, at, axis=1, mode="promise_in_bounds")

    def one_round(state: tuple[int, jax.Array]) -> tuple[int, jax.Array]:
        done, results = state
        row = jax.lax.dynamic_index_in_dim(order, done, axis=1)
        result = function(*(pick(rows, row)[:, 0] for rows in groups))
        return done + 1, jax.lax.dynamic_update_index_in_dim(results, result, done, axis=1)

    like = jax.eval_shape(function, *(rows[:, 0] for rows in groups))
    results = jnp.zeros((*wanted.shape, *like.shape[1:]), like.dtype)
    _, results = jax.lax.while_loop(lambda state: state[0] < rounds, one_round, (0, results))
    return pick(results, jnp.argsort(order, axis=1)).reshape(-1, *like.shape[1:])
