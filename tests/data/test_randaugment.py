"""RandAugment against timm's pixels (tests/golden/make_randaugment.py) and its own definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from ml_collections import ConfigDict
from PIL import Image, ImageOps

from convit_jax.data import image_ops
from convit_jax.data.randaugment import Op, apply_operation, draw_operations, randaugment

FILL = (124, 116, 104)
NAMES = (
    "AutoContrast Equalize Invert Rotate PosterizeIncreasing SolarizeIncreasing SolarizeAdd ColorIncreasing "
    "ContrastIncreasing BrightnessIncreasing SharpnessIncreasing ShearX ShearY TranslateXRel TranslateYRel"
)
TIMM = dict(zip(NAMES.split(), sorted({*Op} - {Op.NONE}), strict=True))
WARPS = (Op.ROTATE, Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y)
ROWS, HEIGHT, WIDTH = 80, 24, 36  # of one_layer, compiled once for the flower


@jax.jit
def one_layer(images, op, magnitude, sign):
    return apply_operation(images, op, magnitude, sign, FILL)


def settings(magnitude=9.0, magnitude_std=0.5, num_ops=2):
    return ConfigDict(dict(magnitude=magnitude, magnitude_std=magnitude_std, num_ops=num_ops))


def padded(array):
    """The array repeated to ROWS rows."""
    return np.resize(array, (ROWS, *array.shape[1:]))


@pytest.mark.parametrize("photo", ["china", "flower"])
def test_operations_give_the_pixels_of_timm(photo):
    with np.load(ROOT / "tests/golden/randaugment.npz") as arrays:
        image = arrays[photo]
        names = [name for name in arrays.files if name.startswith(f"{photo}/")]
        expected = np.stack([arrays[name] for name in names])
    assert len(names) <= ROWS
    op, magnitude, sign = zip(*(name.split("/")[1:] for name in names), strict=True)
    op = np.array([TIMM[name] for name in op], np.int32)
    assert {*op} == {*TIMM.values()}
    signs = np.array([float(f"{each}1") for each in sign], np.float32)
    arguments = (image[None], op, np.array(magnitude, np.float32), signs)
    ours = np.asarray(one_layer(*map(padded, arguments)))[: len(names)]
    warps = np.isin(op, WARPS)
    assert warps.sum() == 5 * 3 * 2
    np.testing.assert_array_equal(ours[~warps], expected[~warps])
    assert (expected != image).any((1, 2, 3)).all()
    difference = np.abs(ours[warps].astype(int) - expected[warps])
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3  # Pillow computes in double


def test_layers_follow_one_another_and_no_bits_left_are_black():
    images = np.random.default_rng(0).integers(0, 256, (ROWS, HEIGHT, WIDTH, 3), dtype=np.uint8)
    op = padded(np.array([Op.POSTERIZE, Op.POSTERIZE, Op.NONE], np.int32))
    ours = np.asarray(one_layer(images, op, padded(np.float32([10, 9, 9])), np.ones(ROWS, np.float32)))
    np.testing.assert_array_equal(ours[:3], [np.zeros_like(images[0]), images[1] & 128, images[2]])

    key, expected = jax.random.key(5), images
    for layer in range(2):
        expected = one_layer(expected, *(draw[:, layer] for draw in draw_operations(key, ROWS, settings())))
    ours = jax.jit(lambda images: randaugment(images, key, settings(), FILL))(images)
    np.testing.assert_array_equal(ours, expected)
    assert ours.dtype == jnp.uint8


RANGES = [np.clip(np.arange(256), low, high) for low in range(0, 256, 5) for high in range(low, 256, 3)]


@pytest.mark.parametrize(
    ("tables", "pillow", "values"),
    [
        (image_ops.autocontrast_tables, ImageOps.autocontrast, RANGES),
        (image_ops.equalize_tables, ImageOps.equalize, [np.resize(few, 900) for few in ([7], [7, 200], range(256))]),
    ],
)
def test_autocontrast_and_equalize_give_pillows_pixels_for_any_range_of_values(tables, pillow, values):
    images = np.repeat(np.uint8(values)[:, None, :, None], 3, axis=3)
    ours = jax.jit(lambda images: image_ops.look_up(images, tables(images)))(images)
    np.testing.assert_array_equal(ours, [np.asarray(pillow(Image.fromarray(image))) for image in images])


def test_draws_follow_their_definition():
    rows, layers = 20000, 3
    draws = jax.jit(lambda key: draw_operations(key, rows, settings(num_ops=layers)))(jax.random.key(0))
    op, magnitude, sign = map(np.asarray, draws)
    assert op.shape == magnitude.shape == sign.shape == (rows, layers)
    probability = np.array([0.5] + [0.5 / 15] * 15)
    for layer in range(layers):
        counts = np.array([(op[:, layer] == which).mean() for which in Op])
        assert (np.abs(counts - probability) < 4 * np.sqrt(probability * (1 - probability) / rows)).all()
    assert set(np.unique(sign)) == {-1.0, 1.0}
    assert abs(sign.mean()) < 4 / np.sqrt(sign.size)
    assert magnitude.max() == 10.0
    for edge, share in ((9.9999, 0.02275), (9.0, 0.5), (9.5, 0.15866)):  # a normal distribution, cut at 2 sigma
        assert abs((magnitude > edge).mean() - share) < 4 * np.sqrt(share / magnitude.size)
    both = (op[:, 0] != Op.NONE) & (op[:, 1] != Op.NONE)  # layers are independent, with replacement
    assert abs(both.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / rows)
    assert abs((op[both, 0] == op[both, 1]).mean() - 1 / 15) < 4 * np.sqrt(1 / 15 / both.sum())
    _, exact, _ = draw_operations(jax.random.key(0), 10, settings(7.0, 0.0))
    np.testing.assert_array_equal(exact, np.full((10, 2), 7.0))
