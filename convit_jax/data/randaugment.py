"""RandAugment (Cubuk et al., arXiv 1909.13719) on the device, as timm's rand-m9-mstd0.5-inc1.

Each of num_ops layers draws one of fifteen operations for an image and applies it with probability 0.5. The
magnitude is m ~ N(magnitude, magnitude_std), clipped to 0..10, and the sign is random. With l = m / 10:

    Rotate                               +-30 l degrees
    ShearX, ShearY                       +-0.3 l
    TranslateX, TranslateY               +-0.45 l of the side
    Posterize                            4 - int(4 l) bits remain
    Solarize                             inverts values from 256 - int(256 l)
    SolarizeAdd                          adds int(110 l) to values below 128
    Color, Contrast, Brightness, Sharpness   factor max(0.1, 1 +- 0.9 l)
    AutoContrast, Equalize, Invert       no magnitude

They reduce to a bicubic affine warp, a lookup table for each channel, and a blend with a degenerate image,
which for Sharpness is a smoothed one.
"""

import enum
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from convit_jax.data import image_ops

# The operations in timm's order; NONE leaves an image unchanged.
Op = enum.IntEnum(
    "Op",
    "NONE AUTO_CONTRAST EQUALIZE INVERT ROTATE POSTERIZE SOLARIZE SOLARIZE_ADD COLOR CONTRAST BRIGHTNESS "
    "SHARPNESS SHEAR_X SHEAR_Y TRANSLATE_X TRANSLATE_Y",
    start=-1,
)


def randaugment(images: jax.Array, key: jax.Array, settings: ConfigDict, fill: Sequence[int]) -> jax.Array:
    """Returns each image, uint8 [B, H, W, 3], after its random operations (timm's `rand_augment_transform`).

    settings is config.augment; fill is the colour, 0..255, of pixels that a warp takes from outside the image.
    """
    draws = draw_operations(key, images.shape[0], settings)

    def layer(number: jax.Array, images: jax.Array) -> jax.Array:
        op, magnitude, sign = (x[:, number] for x in draws)
        return apply_operation(images, op, magnitude, sign, fill)

    # With a Python loop XLA would fuse the layers and compute pixels of the first several times.
    return jax.lax.fori_loop(0, settings.num_ops, layer, images)


def draw_operations(key: jax.Array, rows: int, settings: ConfigDict) -> tuple[jax.Array, ...]:
    """Returns operations (`Op.NONE` if not applied), magnitudes in 0..10 and signs, [rows, num_ops] each."""
    op_key, apply_key, magnitude_key, sign_key = jax.random.split(key, 4)
    shape = (rows, settings.num_ops)
    ops = jax.random.randint(op_key, shape, 0, len(Op) - 1)
    ops = jnp.where(jax.random.bernoulli(apply_key, 0.5, shape), ops, Op.NONE)
    noise = settings.magnitude_std * jax.random.normal(magnitude_key, shape)
    magnitudes = jnp.clip(settings.magnitude + noise, 0.0, 10.0)
    return ops, magnitudes, jax.random.rademacher(sign_key, shape, jnp.float32)


def apply_operation(
    images: jax.Array, op: jax.Array, magnitude: jax.Array, sign: jax.Array, fill: Sequence[int]
) -> jax.Array:
    """Returns each image after one operation (timm's `AugmentOp`); draws are [B], as of `draw_operations`."""
    level = magnitude / 10.0
    # An image has one operation at most, so the order of the kernels does not matter.
    warps = (op == Op.ROTATE) | (op >= Op.SHEAR_X)
    matrices = _affine_matrices(op, sign * level, *images.shape[1:3])
    warped = image_ops.some_rows(functools.partial(image_ops.warp, fill=fill), warps, images, matrices)
    images = jnp.where(warps[:, None, None, None], warped, images)
    images = image_ops.look_up(images, _tables(images, op, level))
    return _enhance(images, op, sign * magnitude)


def _affine_matrices(op: jax.Array, level: jax.Array, height: int, width: int) -> jax.Array:
    """Matrices for `image_ops.warp`, float32 [B, 2, 3]; the identity for other operations."""

    def setting(which: int, value: float) -> jax.Array:
        return jnp.where(op == which, value * level, 0.0)

    angle = setting(Op.ROTATE, math.radians(30.0))
    shear_x, shear_y = setting(Op.SHEAR_X, 0.3), setting(Op.SHEAR_Y, 0.3)
    # Pillow shears around the corner of the image.
    shift_x = shear_x * height / 2 + setting(Op.TRANSLATE_X, 0.45 * width)
    shift_y = shear_y * width / 2 + setting(Op.TRANSLATE_Y, 0.45 * height)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first = jnp.stack([cos, shear_x - sin, shift_x], axis=-1)
    return jnp.stack([first, jnp.stack([shear_y + sin, cos, shift_y], axis=-1)], axis=-2)


def _tables(images: jax.Array, op: jax.Array, level: jax.Array) -> jax.Array:
    """Tables for `image_ops.look_up`, uint8 [B, 256, 3]; the identity for other operations."""
    op, level = op[:, None, None], level[:, None, None]
    values = jnp.arange(256)[None, :, None]
    bits = 4 - (4 * level).astype(jnp.int32)  # 0 bits: black
    threshold = 256 - (256 * level).astype(jnp.int32)
    added = jnp.minimum(values + (110 * level).astype(jnp.int32), 255)
    equalized = image_ops.some_rows(image_ops.equalize_tables, (op == Op.EQUALIZE)[:, 0, 0], images)
    by_op = {
        Op.AUTO_CONTRAST: image_ops.autocontrast_tables(images),
        Op.EQUALIZE: equalized,
        Op.INVERT: 255 - values,
        Op.POSTERIZE: values >> (8 - bits) << (8 - bits),
        Op.SOLARIZE: jnp.where(values < threshold, values, 255 - values),
        Op.SOLARIZE_ADD: jnp.where(values < 128, added, values),
    }
    result = jnp.broadcast_to(values, (*op.shape[:1], 256, 3))
    for which, table in by_op.items():
        result = jnp.where(op == which, table, result)
    return result.astype(jnp.uint8)


def _enhance(images: jax.Array, op: jax.Array, magnitude: jax.Array) -> jax.Array:
    """ImageEnhance's four operations with a signed magnitude; other operations leave the image unchanged."""
    changed = (op >= Op.COLOR) & (op <= Op.SHARPNESS)
    factor = (100.0 + 9.0 * magnitude) / 100.0  # 1 + 0.9 level, rounded once
    factor = jnp.where(changed, jnp.maximum(0.1, factor), 1.0)
    op = op[:, None, None, None]
    degenerate = jnp.where(op == Op.COLOR, image_ops.grey(images), 0)
    degenerate = jnp.where(op == Op.CONTRAST, image_ops.mean_grey(images), degenerate)
    degenerate = jnp.where(op == Op.SHARPNESS, image_ops.smooth(images), degenerate)
    return image_ops.blend(degenerate, images, factor)
