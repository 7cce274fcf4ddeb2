"""Augmentation on the device, before mixup: shift, flip, RandAugment, colours, normalisation, erasing.

Every draw depends on the key of the step and on the row in the global batch, so it is the same on any number
of devices. Images are uint8 up to normalisation, and every operation rounds as Pillow does.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from convit_jax.data import image_ops
from convit_jax.data.randaugment import randaugment

LARGEST_ERASED = 1 / 3  # share of the image
LONGEST_ERASED = 1 / 0.3  # ratio of the sides


def augment(
    images: jax.Array, key: jax.Array, settings: ConfigDict, *, mean: Sequence[float], std: Sequence[float]
) -> jax.Array:
    """Returns uint8 images [B, H, W, 3] as the model sees them, except for mixup and cutmix: float32 [B, H, W, 3].

    The order of timm's `transforms_imagenet_train`, after the random resized crop on the host. settings is
    config.augment; mean and std are for pixels in 0..1.
    """
    # Always five keys, so that leaving out one stage does not change the others.
    shift_key, flip_key, policy_key, jitter_key, erase_key = jax.random.split(key, 5)
    if settings.crop == "pad" and settings.padding > 0:
        images = random_shift(images, settings.padding, shift_key)
    if settings.hflip:
        images = random_flip(images, flip_key)
    if settings.policy == "randaugment":
        fill = [min(255, round(255 * value)) for value in mean]
        images = randaugment(images, policy_key, settings, fill)
    elif settings.policy == "three_augment":
        images = three_augment(images, policy_key)
    if settings.color_jitter > 0:
        images = color_jitter(images, jitter_key, settings.color_jitter)
    images = normalize(images, mean, std)
    if settings.erase_prob > 0:
        images = random_erasing(images, erase_key, settings.erase_prob)
    return images


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Returns (images / 255 - mean) / std per channel, float32, for uint8 [B, H, W, 3]."""
    means, stds = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    return (images.astype(jnp.float32) / 255.0 - means) / stds


def random_shift(images: jax.Array, padding: int, key: jax.Array) -> jax.Array:
    """Returns random crops of the black-padded images [B, H, W, C] (torchvision's `RandomCrop`)."""
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    corners = jax.random.randint(key, (images.shape[0], 2), 0, 2 * padding + 1)
    cut = jax.vmap(lambda image, corner: jax.lax.dynamic_slice(image, (*corner, 0), images.shape[1:]))
    return cut(padded, corners)


def random_flip(images: jax.Array, key: jax.Array) -> jax.Array:
    """Returns the images [B, H, W, C], half of them mirrored (torchvision's `RandomHorizontalFlip`)."""
    flip = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(flip, images[:, :, ::-1], images)


def three_augment(images: jax.Array, key: jax.Array) -> jax.Array:
    """Returns each image, uint8 [B, H, W, 3], grey, solarized or blurred (3-Augment, DeiT III, arXiv 2204.07118)."""
    choice_key, sigma_key = jax.random.split(key)
    choice = jax.random.randint(choice_key, (images.shape[0], 1, 1, 1), 0, 3)
    sigma = jax.random.uniform(sigma_key, (images.shape[0],), minval=0.1, maxval=2.0)
    blurred = image_ops.some_rows(image_ops.gaussian_blur, (choice == 2)[:, 0, 0, 0], images, sigma)
    solarized = jnp.where(images < 128, images, 255 - images)
    plain = jnp.where(choice == 0, image_ops.grey(images).astype(jnp.uint8), solarized)
    return jnp.where(choice == 2, blurred, plain)


def color_jitter(images: jax.Array, key: jax.Array, strength: float) -> jax.Array:
    """Changes brightness, contrast and saturation in random order (torchvision's `ColorJitter` without hue).

    The factors are uniform in 1 +- strength. uint8 [B, H, W, 3].
    """
    order_key, factor_key = jax.random.split(key)
    shape = (images.shape[0], 3)
    order = jnp.argsort(jax.random.uniform(order_key, shape), axis=1)
    low = max(0.0, 1.0 - strength)
    factors = jax.random.uniform(factor_key, shape, minval=low, maxval=1.0 + strength)
    for turn in range(3):
        which = order[:, turn, None, None, None]
        degenerate = jnp.where(which == 1, image_ops.mean_grey(images), 0)
        degenerate = jnp.where(which == 2, image_ops.grey(images), degenerate)
        images = image_ops.blend(degenerate, images, factors[:, turn])
    return images


def random_erasing(images: jax.Array, key: jax.Array, prob: float) -> jax.Array:
    """Puts a box of N(0, 1) noise into a share `prob` of the images [B, H, W, C] (timm's `RandomErasing`, "pixel")."""
    box_key, noise_key = jax.random.split(key)
    rows, height, width, channels = images.shape
    boxes = erasing_boxes(box_key, rows, height, width, prob)
    top, bottom, left, right = (edge[:, None, None] for edge in boxes)
    y, x = jnp.arange(height)[:, None], jnp.arange(width)
    inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)
    # Noise is drawn for the box and looked up, which is cheaper than drawing it for the whole image.
    noise = jax.random.normal(noise_key, (rows, largest_erased(height, width), channels))
    place = jnp.where(inside, (y - top) * (right - left) + x - left, 0).reshape(rows, -1, 1)
    noise = jnp.take_along_axis(noise, place, axis=1, mode="promise_in_bounds")
    return jnp.where(inside[..., None], noise.reshape(images.shape), images)


def erasing_boxes(key: jax.Array, rows: int, height: int, width: int, prob: float) -> tuple[jax.Array, ...]:
    """Returns timm's boxes: (top, bottom, left, right), int32 [rows] each, empty where nothing is erased.

    A box is the first of ten that is smaller than the image. Its area is 2 % to 1/3 of the image, its
    height / width log-uniform in 0.3 to 1 / 0.3, its place uniform.
    """
    on_key, area_key, aspect_key, y_key, x_key = jax.random.split(key, 5)
    tries = (rows, 10)
    area = jax.random.uniform(area_key, tries, minval=0.02, maxval=LARGEST_ERASED) * (height * width)
    longest = math.log(LONGEST_ERASED)
    log_aspect = jax.random.uniform(aspect_key, tries, minval=-longest, maxval=longest)
    h = jnp.round(jnp.sqrt(area * jnp.exp(log_aspect))).astype(jnp.int32)
    w = jnp.round(jnp.sqrt(area / jnp.exp(log_aspect))).astype(jnp.int32)
    fits = (h < height) & (w < width)
    first = jnp.argmax(fits, axis=1)[:, None]
    erased = jnp.any(fits, axis=1) & jax.random.bernoulli(on_key, prob, (rows,))
    h, w = (jnp.where(erased, jnp.take_along_axis(side, first, axis=1)[:, 0], 0) for side in (h, w))
    top = jnp.floor(jax.random.uniform(y_key, (rows,)) * (height - h + 1)).astype(jnp.int32)
    left = jnp.floor(jax.random.uniform(x_key, (rows,)) * (width - w + 1)).astype(jnp.int32)
    return top, top + h, left, left + w


def largest_erased(height: int, width: int) -> int:
    """Returns the pixels of the largest box of `erasing_boxes`; rounding adds at most 1/2 to each side."""
    area = LARGEST_ERASED * height * width
    sides = math.sqrt(area * LONGEST_ERASED) + math.sqrt(area / LONGEST_ERASED)
    return math.ceil(area + sides / 2 + 1 / 4)
