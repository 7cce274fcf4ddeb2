"""What happens to a batch on the device, before mixup: shift, flip, RandAugment, colours, normalise, erase.

Every draw is keyed by (seed, step) and the example's row in the global batch, so it does not depend on how
many devices share the batch. Up to normalising, images are uint8: every operation rounds as Pillow does.
"""

import math

import jax
import jax.numpy as jnp

from convit_jax.data import image_ops
from convit_jax.data.randaugment import randaugment


def normalize(images, mean, std):
    """uint8 [B, H, W, 3] -> float32, (images / 255 - mean) / std per channel."""
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    return (images.astype(jnp.float32) / 255.0 - mean) / std


def random_shift(images, padding, key):
    """Random crop of the black-padded image (torchvision's RandomCrop): uint8 [B, H, W, C] -> the same."""
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    corners = jax.random.randint(key, (images.shape[0], 2), 0, 2 * padding + 1)

    def cut(image, corner):
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), images.shape[1:])

    return jax.vmap(cut)(padded, corners)


def random_flip(images, key):
    """Each image [B, H, W, C] mirrored left to right with probability 0.5."""
    flip = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(flip, images[:, :, ::-1], images)


def three_augment(images, key):
    """Grey, solarized from 128 up, or blurred with sigma 0.1 to 2 pixels (DeiT III, arXiv 2204.07118)."""
    choice_key, sigma_key = jax.random.split(key)
    choice = jax.random.randint(choice_key, (images.shape[0], 1, 1, 1), 0, 3)
    sigma = jax.random.uniform(sigma_key, (images.shape[0],), minval=0.1, maxval=2.0)
    blurred = image_ops.some_rows(image_ops.gaussian_blur, (choice == 2)[:, 0, 0, 0], images, sigma)
    solarized = jnp.where(images < 128, images, 255 - images)
    plain = jnp.where(choice == 0, image_ops.grey(images).astype(jnp.uint8), solarized)
    return jnp.where(choice == 2, blurred, plain)


def color_jitter(images, key, strength):
    """Brightness, contrast, saturation by 1 +- strength, in random order (torchvision's ColorJitter)."""
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


LARGEST_ERASED, LONGEST_ERASED = 1 / 3, 1 / 0.3  # share of the image's area; h / w, or w / h


def erasing_boxes(key, rows, height, width, prob):
    """Boxes of timm's RandomErasing: (top, bottom, left, right), int32 [rows] each; empty for no erasing.

    The first of ten tries that is smaller than the image: 2 % to 1/3 of its area, log-uniform aspect h / w
    of 0.3 to 1 / 0.3, a uniform position.
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


def most_erased(height, width):
    """Pixels of the largest box that erasing_boxes can give; rounding adds at most a half to each side."""
    area = LARGEST_ERASED * height * width
    sides = math.sqrt(area * LONGEST_ERASED) + math.sqrt(area / LONGEST_ERASED)
    return math.ceil(area + sides / 2 + 1 / 4)


def random_erasing(images, key, prob):
    """A random box of some images replaced by N(0, 1) a value (timm's mode "pixel"): float32 [B, H, W, C]."""
    box_key, noise_key = jax.random.split(key)
    rows, height, width, channels = images.shape
    boxes = erasing_boxes(box_key, rows, height, width, prob)
    top, bottom, left, right = (edge[:, None, None] for edge in boxes)
    y, x = jnp.arange(height)[:, None], jnp.arange(width)
    inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)
    # Noise is drawn for a box and not for the whole image: drawing costs more than looking it up.
    noise = jax.random.normal(noise_key, (rows, most_erased(height, width), channels))
    place = jnp.where(inside, (y - top) * (right - left) + x - left, 0).reshape(rows, -1, 1)
    noise = jnp.take_along_axis(noise, place, axis=1, mode="promise_in_bounds")
    return jnp.where(inside[..., None], noise.reshape(images.shape), images)


def stage_keys(key):
    """A key for each stage: leaving one out changes no other."""
    names = ("shift", "flip", "policy", "jitter", "erase")
    return dict(zip(names, jax.random.split(key, len(names)), strict=True))


def augment(images, key, settings, *, mean, std):
    """uint8 [B, H, W, 3] -> float32, augmented and normalised.

    Args:
      settings: config.augment. mean, std: of each channel of pixels in 0..1.
    """
    keys = stage_keys(key)
    if settings.crop == "pad" and settings.padding > 0:  # "resized" was done by the host
        images = random_shift(images, settings.padding, keys["shift"])
    if settings.hflip:
        images = random_flip(images, keys["flip"])
    if settings.policy == "randaugment":
        images = randaugment(
            images,
            keys["policy"],
            magnitude=settings.magnitude,
            magnitude_std=settings.magnitude_std,
            num_ops=settings.num_ops,
            fill=[min(255, round(255 * value)) for value in mean],
        )
    elif settings.policy == "three_augment":
        images = three_augment(images, keys["policy"])
    if settings.color_jitter > 0:
        images = color_jitter(images, keys["jitter"], settings.color_jitter)
    images = normalize(images, mean, std)
    if settings.erase_prob > 0:
        images = random_erasing(images, keys["erase"], settings.erase_prob)
    return images
