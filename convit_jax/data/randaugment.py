"""RandAugment (Cubuk et al., arXiv 1909.13719) as timm's rand-m9-mstd0.5-inc1 draws it, on the device.

Each of num_ops layers draws one of fifteen operations for an image and applies it with probability 0.5. Its
magnitude m ~ N(magnitude, magnitude_std), cut to 0..10, and a random sign give its setting; l = m / 10:
    Rotate +-30 l degrees; Shear +-0.3 l; Translate +-0.45 l of the side; Posterize to 4 - int(4 l) bits;
    Solarize from 256 - int(256 l) up; SolarizeAdd int(110 l); Color, Contrast, Brightness, Sharpness
    max(0.1, 1 +- 0.9 l); AutoContrast, Equalize and Invert have none.
They are three kernels: a bicubic affine warp, a lookup table a channel, a blend with a degenerate image.
"""

import enum
import math

import jax
import jax.numpy as jnp

from convit_jax.data import image_ops


class Op(enum.IntEnum):
    """The operations in timm's order; NONE leaves an image as it is."""

    NONE = -1
    AUTO_CONTRAST = 0
    EQUALIZE = 1
    INVERT = 2
    ROTATE = 3
    POSTERIZE = 4
    SOLARIZE = 5
    SOLARIZE_ADD = 6
    COLOR = 7
    CONTRAST = 8
    BRIGHTNESS = 9
    SHARPNESS = 10
    SHEAR_X = 11
    SHEAR_Y = 12
    TRANSLATE_X = 13
    TRANSLATE_Y = 14


APPLY_PROB = 0.5  # of each drawn operation


def randaugment(images, key, *, magnitude, magnitude_std, num_ops, fill):
    """uint8 [B, H, W, 3] -> the same, each image through num_ops drawn operations.

    fill: three values in 0..255 for what a warp brings in from outside the image.
    """
    draws = draw(key, images.shape[0], magnitude, magnitude_std, num_ops)

    def layer(number, images):
        return apply(images, *(x[:, number] for x in draws), fill)

    # A loop and not Python's: XLA would fuse the layers and compute pixels of the first several times.
    return jax.lax.fori_loop(0, num_ops, layer, images)


def draw(key, rows, magnitude, magnitude_std, num_ops):
    """Operations (NONE where not applied), magnitudes in 0..10 and signs: [rows, num_ops] each."""
    op_key, apply_key, magnitude_key, sign_key = jax.random.split(key, 4)
    shape = (rows, num_ops)
    ops = jax.random.randint(op_key, shape, 0, len(Op) - 1)
    ops = jnp.where(jax.random.bernoulli(apply_key, APPLY_PROB, shape), ops, Op.NONE)
    magnitudes = jnp.clip(magnitude + magnitude_std * jax.random.normal(magnitude_key, shape), 0.0, 10.0)
    return ops, magnitudes, jax.random.rademacher(sign_key, shape, jnp.float32)


def apply(images, op, magnitude, sign, fill):
    """One operation an image.

    Args:
      images: uint8 [B, H, W, 3].
      op: int32 [B], of Op. magnitude: float32 [B], 0..10. sign: float32 [B], +1 or -1.
      fill: three values in 0..255.
    """
    level = magnitude / 10.0
    # No image has more than one operation, so the order of the kernels does not matter.
    warps = (op == Op.ROTATE) | (op >= Op.SHEAR_X)
    matrices = affine_matrices(op, sign * level, *images.shape[1:3])

    def warp(images, matrices):
        return image_ops.warp(images, matrices, fill)

    warped = image_ops.some_rows(warp, warps, images, matrices)
    images = jnp.where(warps[:, None, None, None], warped, images)
    images = image_ops.look_up(images, tables(images, op, level))
    return blend(images, op, sign * magnitude)


def affine_matrices(op, level, height, width):
    """float32 [B, 2, 3] for image_ops.warp, of a signed level; the identity for other operations."""

    def setting(which, value):
        return jnp.where(op == which, value * level, 0.0)

    angle = setting(Op.ROTATE, math.radians(30.0))
    shear_x, shear_y = setting(Op.SHEAR_X, 0.3), setting(Op.SHEAR_Y, 0.3)
    # Pillow shears around the corner of the image.
    shift_x = shear_x * height / 2 + setting(Op.TRANSLATE_X, 0.45 * width)
    shift_y = shear_y * width / 2 + setting(Op.TRANSLATE_Y, 0.45 * height)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first = jnp.stack([cos, shear_x - sin, shift_x], axis=-1)
    return jnp.stack([first, jnp.stack([shear_y + sin, cos, shift_y], axis=-1)], axis=-2)


def tables(images, op, level):
    """uint8 [B, 256, 3] for image_ops.look_up; the identity for other operations."""
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


def blend(images, op, magnitude):
    """ImageEnhance's four operations with a signed magnitude."""
    changed = (op >= Op.COLOR) & (op <= Op.SHARPNESS)
    factor = (100.0 + 9.0 * magnitude) / 100.0  # 1 + 0.9 level, rounded once
    factor = jnp.where(changed, jnp.maximum(0.1, factor), 1.0)  # factor 1 is the image itself
    op = op[:, None, None, None]
    degenerate = jnp.where(op == Op.COLOR, image_ops.grey(images), 0)
    degenerate = jnp.where(op == Op.CONTRAST, image_ops.mean_grey(images), degenerate)
    degenerate = jnp.where(op == Op.SHARPNESS, image_ops.smooth(images), degenerate)
    return image_ops.blend(degenerate, images, factor)
