"""Augmentation on the device: what it may do to an image, how often, and that devices do not change it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from convit_jax.data.augment import augment, normalize, random_flip, random_shift

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE = np.arange(1, 1 + 4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)  # all values differ, none is black


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
    result = augment(images, jax.random.key(0), crop=crop, padding=padding, hflip=False, mean=MEAN, std=STD)
    np.testing.assert_array_equal(result, normalize(images, MEAN, STD))


@pytest.mark.parametrize("crop", ["pad", "resized"])
@pytest.mark.parametrize("hflip", [True, False])
def test_augment_shows_each_shift_and_mirror_image_that_it_is_asked_for_and_no_other(crop, hflip):
    images = jnp.tile(IMAGE, (600, 1, 1, 1))
    result = augment(images, jax.random.key(1), crop=crop, padding=1, hflip=hflip, mean=MEAN, std=STD)
    assert result.dtype == jnp.float32
    expected = set(windows(IMAGE, 1 if crop == "pad" else 0).values())
    if hflip:
        mirrored = np.ascontiguousarray(IMAGE[:, ::-1])
        expected |= set(windows(mirrored, 1 if crop == "pad" else 0).values())
    assert {image.tobytes() for image in denormalized(result)} == expected


def test_augmentation_is_a_function_of_the_key():
    images = jnp.tile(IMAGE, (16, 1, 1, 1))
    settings = dict(crop="pad", padding=2, hflip=True, mean=MEAN, std=STD)
    first, again, other = (augment(images, jax.random.key(seed), **settings) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize("crop", ["pad", "resized"])
def test_a_batch_over_eight_devices_is_augmented_exactly_as_on_one(crop):
    devices = np.array(jax.devices())
    assert devices.size == 8
    images = np.random.default_rng(0).integers(0, 256, (32, 8, 6, 3), dtype=np.uint8)
    function = jax.jit(partial(augment, crop=crop, padding=2, hflip=True, mean=MEAN, std=STD))
    rows = NamedSharding(Mesh(devices, ("data",)), PartitionSpec("data"))
    alone = function(jax.device_put(images, devices[0]), jax.random.key(3))
    shared = function(jax.device_put(images, rows), jax.random.key(3))
    assert len(alone.sharding.device_set) == 1
    assert shared.sharding.is_equivalent_to(rows, shared.ndim)
    np.testing.assert_array_equal(shared, alone)
