"""Augmentation on the device: what it may do to an image, how often, and that devices do not change it."""

import itertools
import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from configs import default
from convit_jax.data.augment import (
    augment,
    color_jitter,
    erasing_boxes,
    most_erased,
    normalize,
    random_erasing,
    random_flip,
    random_shift,
    three_augment,
)
from convit_jax.data.image_ops import blend, grey, mean_grey
from convit_jax.data.randaugment import randaugment

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE = np.arange(1, 1 + 4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)  # all values differ, none is black


def settings(**changes):
    """config.augment with every stage off but for the changes."""
    config = default.get_config().augment
    config.update(policy="none", erase_prob=0.0, hflip=False)
    config.update(changes)
    return config


def run(images, key, asked):
    """augment, compiled."""
    return jax.jit(lambda images, key: augment(images, key, asked, mean=MEAN, std=STD))(images, key)


def photos(rows, height=24, width=20):
    """Smooth random images, uint8 [rows, height, width, 3]."""
    coarse = np.random.default_rng(0).uniform(0, 255, (rows, 4, 4, 3))
    return jax.image.resize(coarse, (rows, height, width, 3), "linear").astype(jnp.uint8)


def windows(image, padding):
    """Offset -> bytes of the window at that offset of the black-padded image."""
    height, width, channels = image.shape
    padded = np.zeros((height + 2 * padding, width + 2 * padding, channels), image.dtype)
    padded[padding : padding + height, padding : padding + width] = image
    side = range(2 * padding + 1)
    return {(y, x): padded[y : y + height, x : x + width].tobytes() for y in side for x in side}


def denormalized(images):
    pixels = (np.asarray(images, np.float64) * STD + MEAN) * 255
    assert np.abs(pixels - pixels.round()).max() < 1e-3
    return pixels.round().astype(np.uint8)


def test_normalize_is_the_formula_per_channel():
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
    result = normalize(jnp.asarray(images), MEAN, STD)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, (images / 255 - np.array(MEAN)) / np.array(STD), atol=1e-6)


@pytest.mark.parametrize("padding", [1, 2])
def test_a_shift_is_a_window_of_the_black_padded_image_at_every_offset_equally_often(padding):
    rows = 3000
    shifted = np.asarray(random_shift(jnp.tile(IMAGE, (rows, 1, 1, 1)), padding, jax.random.key(0)))
    assert (shifted.dtype, shifted.shape) == (np.uint8, (rows, *IMAGE.shape))
    offset_of = {window: offset for offset, window in windows(IMAGE, padding).items()}
    offsets = np.array([offset_of[image.tobytes()] for image in shifted])
    side = 2 * padding + 1
    counts = np.bincount(offsets[:, 0] * side + offsets[:, 1], minlength=side**2)
    assert np.abs(counts / rows - side**-2).max() < 4 * np.sqrt(side**-2 / rows)


def test_half_of_the_images_are_mirrored_left_to_right_each_on_its_own():
    images = np.random.default_rng(0).integers(0, 256, (2000, 3, 4, 3), dtype=np.uint8)
    flipped = np.asarray(random_flip(jnp.asarray(images), jax.random.key(0)))
    same = (flipped == images).all((1, 2, 3))
    mirrored = (flipped == images[:, :, ::-1]).all((1, 2, 3))
    assert (same ^ mirrored).all()
    assert abs(mirrored.mean() - 0.5) < 0.045  # four standard deviations
    assert 900 < (mirrored[1:] != mirrored[:-1]).sum() < 1100


@pytest.mark.parametrize(("crop", "padding"), [("resized", 4), ("pad", 0)])
def test_without_shift_and_flip_images_are_only_normalised(crop, padding):
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (8, 4, 5, 3), dtype=np.uint8))
    result = augment(images, jax.random.key(0), settings(crop=crop, padding=padding), mean=MEAN, std=STD)
    np.testing.assert_array_equal(result, normalize(images, MEAN, STD))


@pytest.mark.parametrize("crop", ["pad", "resized"])
@pytest.mark.parametrize("hflip", [True, False])
def test_augment_shows_each_shift_and_mirror_image_that_it_is_asked_for_and_no_other(crop, hflip):
    images = jnp.tile(IMAGE, (600, 1, 1, 1))
    asked = settings(crop=crop, padding=1, hflip=hflip)
    result = run(images, jax.random.key(1), asked)
    assert result.dtype == jnp.float32
    expected = set(windows(IMAGE, 1 if crop == "pad" else 0).values())
    if hflip:
        mirrored = np.ascontiguousarray(IMAGE[:, ::-1])
        expected |= set(windows(mirrored, 1 if crop == "pad" else 0).values())
    assert {image.tobytes() for image in denormalized(result)} == expected


def test_shift_and_flip_draw_from_keys_that_no_later_stage_changes():
    images, key = photos(32), jax.random.key(4)
    shift_key, flip_key = jax.random.split(key)
    expected = random_flip(random_shift(images, 2, shift_key), flip_key)
    result = run(images, key, settings(crop="pad", padding=2, hflip=True))
    np.testing.assert_array_equal(denormalized(result), expected)


def test_the_stages_come_in_the_order_of_the_recipe():
    images, key = photos(32), jax.random.key(4)
    keys = jax.random.split(key, 5)
    options = dict(magnitude=5.0, magnitude_std=1.0, num_ops=1)

    @jax.jit
    def expected(images):
        images = random_flip(images, keys[1])
        images = randaugment(images, keys[2], **options, fill=(124, 116, 104))  # the mean as a colour
        images = normalize(color_jitter(images, keys[3], 0.3), MEAN, STD)
        return random_erasing(images, keys[4], 0.5)

    asked = settings(policy="randaugment", hflip=True, color_jitter=0.3, erase_prob=0.5, **options)
    np.testing.assert_array_equal(run(images, key, asked), expected(images))
    three = jax.jit(three_augment)(images, keys[2])
    np.testing.assert_array_equal(denormalized(run(images, key, settings(policy="three_augment"))), three)


def test_augmentation_is_a_function_of_the_key():
    images = jnp.tile(IMAGE, (16, 1, 1, 1))
    asked = settings(crop="pad", padding=2, hflip=True, policy="randaugment", num_ops=1, erase_prob=0.25)
    function = jax.jit(lambda key: augment(images, key, asked, mean=MEAN, std=STD))
    first, again, other = (function(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


RECIPES = {
    "deit": dict(policy="randaugment", num_ops=1, crop="pad", padding=2, erase_prob=0.25),
    "deit3": dict(policy="three_augment", color_jitter=0.3),
}


# 16 rows of a device are as many as some_rows works on together, 4 are fewer.
@pytest.mark.parametrize(("recipe", "rows"), [("deit", 32), ("deit", 128), ("deit3", 128)])
def test_a_batch_over_eight_devices_is_augmented_exactly_as_on_one(recipe, rows):
    devices = np.array(jax.devices())
    assert devices.size == 8
    images, key = np.asarray(photos(rows, 12, 10)), jax.random.key(3)
    asked = settings(hflip=True, **RECIPES[recipe])
    sharding = NamedSharding(Mesh(devices, ("data",)), PartitionSpec("data"))
    alone = run(jax.device_put(images, devices[0]), key, asked)
    shared = run(jax.device_put(images, sharding), key, asked)
    assert len(alone.sharding.device_set) == 1
    assert shared.sharding.is_equivalent_to(sharding, shared.ndim)
    np.testing.assert_array_equal(shared, alone)


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_image_does_not_depend_on_the_others_of_its_batch(recipe):
    images, key = photos(48), jax.random.key(2)
    asked = settings(hflip=True, **RECIPES[recipe])
    few = run(images[:20], key, asked)
    others = images.at[:19].set(images[20:39]).at[20:].set(0)
    result = run(others, key, asked)
    np.testing.assert_array_equal(result[19], few[19])
    assert (result[:19] != few[:19]).any((1, 2, 3)).all()


def test_no_pixel_travels_between_devices():
    rows = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    asked = settings(hflip=True, **RECIPES["deit"])
    function = jax.jit(lambda images: augment(images, jax.random.key(3), asked, mean=MEAN, std=STD))
    images = jax.ShapeDtypeStruct((128, 12, 10, 3), np.uint8, sharding=rows)
    text = function.lower(images).compile().as_text()
    assert "all-reduce" in text  # how many rounds some_rows takes
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in text


def test_three_augment_is_grey_solarized_or_blurred_each_for_a_third():
    rows = 900
    images = jnp.tile(photos(1), (rows, 1, 1, 1))
    results = np.asarray(jax.jit(three_augment)(images, jax.random.key(0)))
    image = np.asarray(images[0])
    is_grey = (results == np.asarray(grey(images[:1]))).all((1, 2, 3))
    solarized = (results == np.where(image < 128, image, 255 - image)).all((1, 2, 3))
    blurred = ~is_grey & ~solarized
    for share in (is_grey.mean(), solarized.mean(), blurred.mean()):
        assert abs(share - 1 / 3) < 4 * np.sqrt(2 / 9 / rows)
    changes = np.abs(results[blurred].astype(int) - image).mean((1, 2, 3))
    means = results[blurred].mean((1, 2, 3))
    assert len(np.unique(changes)) > 50  # of many strengths
    assert np.abs(means - image.mean()).max() < 2  # a blur keeps the mean


def test_color_jitter_applies_three_blends_in_each_order_equally_often():
    rows, strength = 1200, 0.5  # factors are u + 0.5, which is rounded once in any program
    images = jnp.tile(photos(1, 6, 5), (rows, 1, 1, 1))
    key = jax.random.key(1)
    results = np.asarray(jax.jit(color_jitter, static_argnums=2)(images, key, strength))
    factor_key = jax.random.split(key)[1]
    factors = jax.random.uniform(factor_key, (rows, 3), minval=0.5, maxval=1.5)
    degenerates = (lambda images: 0, mean_grey, grey)
    shares = []
    for order in itertools.permutations(degenerates):
        expected = images
        for turn, degenerate in enumerate(order):
            expected = blend(degenerate(expected), expected, factors[:, turn])
        shares.append((np.asarray(expected) == results).all((1, 2, 3)))
    assert np.any(shares, axis=0).all()
    assert np.abs(np.mean(shares, axis=1) - 1 / 6).max() < 0.06  # some orders give the same image


def timms_box(height, width, rng):
    """timm's RandomErasing, draw by draw; None where ten tries fail."""
    for _ in range(10):
        area = rng.uniform(0.02, 1 / 3) * height * width
        aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if w < width and h < height:
            return rng.randint(0, height - h), h, rng.randint(0, width - w), w
    return None


def largest_gap(a, b):
    """Largest difference of the cumulative distributions of two samples (Kolmogorov and Smirnov)."""
    both = np.concatenate([a, b])
    a, b = (np.searchsorted(np.sort(x), both, side="right") / len(x) for x in (a, b))
    return np.abs(a - b).max()


@pytest.mark.parametrize(("height", "width"), [(32, 32), (20, 60)])
def test_erasing_boxes_are_distributed_as_timms(height, width):
    rows, rng = 8000, random.Random(0)
    top, bottom, left, right = np.asarray(erasing_boxes(jax.random.key(0), rows, height, width, 1.0))
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (bottom <= height).all()
    assert (right <= width).all()
    h, w = bottom - top, right - left
    expected = [timms_box(height, width, rng) for _ in range(rows)]
    assert abs((h > 0).mean() - np.mean([box is not None for box in expected])) < 0.01
    expected_top, expected_h, expected_left, expected_w = np.array([box for box in expected if box]).T
    top, left, h, w = (x[h > 0] for x in (top, left, h, w))
    for ours, theirs in (
        (h * w, expected_h * expected_w),
        (h / w, expected_h / expected_w),
        (top, expected_top),
        (left, expected_left),
    ):
        assert largest_gap(ours, theirs) < 1.95 * np.sqrt(2 / len(ours))  # exceeded once in a thousand
    assert 0.9 * most_erased(height, width) < (h * w).max() <= most_erased(height, width)
    assert (top + h == height).any()  # boxes reach the edge
    assert (top == 0).any()


def test_a_box_too_large_for_the_image_erases_nothing():
    boxes = np.asarray(erasing_boxes(jax.random.key(0), 50, 1, 40, 1.0))
    assert (boxes[0] == boxes[1]).all()


def test_erased_pixels_are_normal_noise_and_the_others_stay():
    rows, prob = 2000, 0.25
    images = jnp.full((rows, 16, 16, 3), 9.0)
    results = np.asarray(random_erasing(images, jax.random.key(0), prob))
    changed = (results != 9.0).all(-1)
    np.testing.assert_array_equal(changed, (results != 9.0).any(-1))
    erased = changed.any((1, 2))
    assert abs(erased.mean() - prob) < 4 * np.sqrt(prob * (1 - prob) / rows)
    lines, columns = changed.any(2).sum(1), changed.any(1).sum(1)
    np.testing.assert_array_equal(lines * columns, changed.sum((1, 2)))  # one box each
    noise = results[changed]
    assert abs(noise.mean()) < 4 / np.sqrt(noise.size)
    assert abs(noise.std() - 1) < 4 / np.sqrt(2 * noise.size)
    assert len(np.unique(noise)) > 0.99 * noise.size  # every pixel and channel on its own
