"""Augmentation on the device: what each stage may do, how often, and that devices do not change it."""

import collections
import functools
import itertools
import math
import random
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from scipy.stats import ks_2samp

from configs import default
from convit_jax.data import augment
from convit_jax.data.image_ops import blend, grey, mean_grey

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE = np.arange(1, 1 + 4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)  # all values differ, none is black
ROWS = 128  # 16 for each of 8 devices
color_jitter = jax.jit(augment.color_jitter, static_argnums=2)
random_erasing = jax.jit(augment.random_erasing, static_argnums=2)
erasing_boxes = jax.jit(augment.erasing_boxes, static_argnums=(1, 2, 3, 4))
RECIPES = {
    "deit": dict(policy="randaugment", num_ops=2, crop="pad", padding=2, color_jitter=0.3, erase_prob=0.25),
    "deit3": dict(policy="three_augment", color_jitter=0.3),
}


def settings(**changes):
    """config.augment with every stage off except for the changes."""
    config = default.get_config().augment
    config.update(policy="none", erase_prob=0.0, hflip=False)
    config.update(changes)
    return config


def compiled(**changes):
    """augment with the settings, jitted: (images, key) -> images."""
    chosen = settings(**changes)
    return jax.jit(lambda images, key: augment.augment(images, key, chosen, mean=MEAN, std=STD))


@functools.cache
def recipe(name):
    """A whole recipe, which all tests share because RandAugment takes seconds to compile."""
    return compiled(hflip=True, **RECIPES[name])


@functools.cache
def photos(rows=ROWS, height=12, width=10):
    """Smooth random images, uint8 [rows, height, width, 3]."""
    coarse = np.random.default_rng(0).uniform(0, 255, (rows, 4, 4, 3))
    return np.asarray(jax.image.resize(coarse, (rows, height, width, 3), "linear").astype(jnp.uint8))


def windows(image, padding):
    """The bytes of each window of the black-padded image."""
    height, width, _ = image.shape
    padded = np.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    offsets = itertools.product(range(2 * padding + 1), repeat=2)
    return {padded[y : y + height, x : x + width].tobytes() for y, x in offsets}


def denormalized(images):
    pixels = (np.asarray(images, np.float64) * STD + MEAN) * 255
    assert np.abs(pixels - pixels.round()).max() < 1e-3
    return pixels.round().astype(np.uint8)


@pytest.mark.parametrize(
    ("crop", "padding", "hflip", "shift"), [("pad", 2, True, 2), ("resized", 4, True, 0), ("pad", 0, False, 0)]
)
def test_each_shift_and_mirror_image_in_the_settings_is_equally_likely(crop, padding, hflip, shift):
    rows, function = 3000, compiled(crop=crop, padding=padding, hflip=hflip)
    result = denormalized(function(jnp.tile(IMAGE, (rows, 1, 1, 1)), jax.random.key(0)))
    shown = [IMAGE, IMAGE[:, ::-1]] if hflip else [IMAGE]
    expected = set().union(*(windows(image, shift) for image in shown))
    counts = collections.Counter(image.tobytes() for image in result)
    assert counts.keys() == expected
    share = 1 / len(expected)
    assert max(abs(count / rows - share) for count in counts.values()) < 4 * np.sqrt(share / rows)


def test_the_stages_follow_the_recipe_each_with_its_own_key(monkeypatch):
    def policy(images, key, settings, fill):  # RandAugment takes seconds to compile
        return images ^ jax.random.bits(key, (3,), jnp.uint8) ^ jnp.array(fill, jnp.uint8)

    monkeypatch.setattr(augment, "randaugment", policy)
    images, key = photos(), jax.random.key(4)
    keys = jax.random.split(key, 5)
    expected = augment.random_flip(augment.random_shift(images, 2, keys[0]), keys[1])
    expected = color_jitter(policy(expected, keys[2], None, (124, 116, 104)), keys[3], 0.3)  # the mean as a colour
    expected = random_erasing((expected / 255 - np.array(MEAN)) / np.array(STD), keys[4], 0.25)
    result = compiled(hflip=True, **RECIPES["deit"])(images, key)
    np.testing.assert_allclose(result, expected, atol=1e-6)
    assert result.dtype == jnp.float32


@pytest.mark.parametrize("name", RECIPES)
def test_an_image_depends_on_its_row_and_the_key_but_not_on_other_images_or_the_number_of_devices(name):
    images = photos()
    first, other_key = (np.asarray(recipe(name)(images, jax.random.key(seed))) for seed in (2, 3))
    assert (first != other_key).any((1, 2, 3)).all()
    others = np.roll(images, 20, axis=0)
    others[19] = images[19]
    result = np.asarray(recipe(name)(others, jax.random.key(2)))
    np.testing.assert_array_equal(result[19], first[19])
    assert (np.delete(result, 19, 0) != np.delete(first, 19, 0)).any((1, 2, 3)).all()
    eight = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    spread = jax.device_put(images, eight)
    program = recipe(name).lower(spread, jax.random.key(2)).compile()
    difference = np.abs(np.asarray(program(spread, jax.random.key(2))) - first)
    assert difference.max() < 1.01 / 255 / min(STD)  # one level, where a sum of the blur is rounded differently
    assert (difference > 0).mean() <= (1e-4 if name == "deit3" else 0)
    assert "all-reduce" in program.as_text()  # the number of rounds of some_rows; pixels stay where they are
    assert not re.search("all-gather|all-to-all|collective-permute", program.as_text())


def test_three_augment_is_grey_solarized_or_blurred_each_for_a_third():
    rows, image = 900, photos()[0]
    function = compiled(policy="three_augment")
    results = denormalized(function(jnp.tile(image, (rows, 1, 1, 1)), jax.random.key(0)))
    is_grey = (results == np.asarray(grey(image[None]))).all((1, 2, 3))
    solarized = (results == np.where(image < 128, image, 255 - image)).all((1, 2, 3))
    blurred = ~is_grey & ~solarized
    for share in (is_grey.mean(), solarized.mean(), blurred.mean()):
        assert abs(share - 1 / 3) < 4 * np.sqrt(2 / 9 / rows)
    changes = np.abs(results[blurred].astype(int) - image).mean((1, 2, 3))
    assert len(np.unique(changes)) > 50  # of many strengths
    assert np.abs(results[blurred].mean((1, 2, 3)) - image.mean()).max() < 2  # a blur keeps the mean


def test_color_jitter_applies_three_blends_in_each_order_equally_often():
    rows, key = 1200, jax.random.key(1)
    images = jnp.tile(photos(1, 6, 5), (rows, 1, 1, 1))
    results = np.asarray(color_jitter(images, key, 0.5))
    factors = jax.random.uniform(jax.random.split(key)[1], (rows, 3), minval=0.5, maxval=1.5)

    @jax.jit
    def in_each_order(images):
        orders = []
        for order in itertools.permutations((lambda images: 0, mean_grey, grey)):
            changed = images
            for turn, degenerate in enumerate(order):
                changed = blend(degenerate(changed), changed, factors[:, turn])
            orders.append(changed)
        return jnp.stack(orders)

    matches = (np.asarray(in_each_order(images)) == results).all((2, 3, 4))
    assert matches.any(axis=0).all()
    assert np.abs(matches.mean(axis=1) - 1 / 6).max() < 0.06  # some orders give the same image


def timms_box(height, width, rng):
    """timm's RandomErasing, draw by draw; None if ten tries fail."""
    for _ in range(10):
        area = rng.uniform(0.02, 1 / 3) * height * width
        aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if w < width and h < height:
            return rng.randint(0, height - h), h, rng.randint(0, width - w), w
    return None


def test_erasing_boxes_are_distributed_as_timms():
    rows, height, width, rng = 8000, 20, 60, random.Random(0)
    top, bottom, left, right = np.asarray(erasing_boxes(jax.random.key(0), rows, height, width, 1.0))
    assert min(top.min(), left.min()) >= 0
    assert (bottom.max(), right.max() <= width) == (height, True)
    h, w = bottom - top, right - left
    expected = [timms_box(height, width, rng) for _ in range(rows)]
    assert abs((h > 0).sum() - sum(box is not None for box in expected)) < 0.01 * rows
    ours = np.stack([h * w, h / np.maximum(w, 1), top, left])[:, h > 0]
    expected_top, expected_h, expected_left, expected_w = np.array([box for box in expected if box]).T
    theirs = [expected_h * expected_w, expected_h / expected_w, expected_top, expected_left]
    for one, other in zip(ours, theirs, strict=True):
        assert ks_2samp(one, other).pvalue > 0.001
    largest = augment.largest_erased(height, width)
    assert 0.9 * largest < (h * w).max() <= largest
    top, bottom, _, _ = np.asarray(erasing_boxes(jax.random.key(0), 50, 1, 40, 1.0))  # no box fits
    assert (top == bottom).all()


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
    assert len(np.unique(noise)) > 0.99 * noise.size  # every pixel and channel has its own
