"""RandAugment against timm's pixels (tests/golden/make_randaugment.py) and its own definition."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

from convit_jax.data import image_ops
from convit_jax.data.randaugment import Op, apply, draw, randaugment

FILL = (124, 116, 104)
TIMM = {
    "AutoContrast": Op.AUTO_CONTRAST,
    "Equalize": Op.EQUALIZE,
    "Invert": Op.INVERT,
    "Rotate": Op.ROTATE,
    "PosterizeIncreasing": Op.POSTERIZE,
    "SolarizeIncreasing": Op.SOLARIZE,
    "SolarizeAdd": Op.SOLARIZE_ADD,
    "ColorIncreasing": Op.COLOR,
    "ContrastIncreasing": Op.CONTRAST,
    "BrightnessIncreasing": Op.BRIGHTNESS,
    "SharpnessIncreasing": Op.SHARPNESS,
    "ShearX": Op.SHEAR_X,
    "ShearY": Op.SHEAR_Y,
    "TranslateXRel": Op.TRANSLATE_X,
    "TranslateYRel": Op.TRANSLATE_Y,
}
WARPS = (Op.ROTATE, Op.SHEAR_X, Op.SHEAR_Y, Op.TRANSLATE_X, Op.TRANSLATE_Y)


@jax.jit
def one_layer(images, op, magnitude, sign):
    return apply(images, op, magnitude, sign, FILL)


@pytest.fixture(scope="module", params=["china", "flower"])
def golden(request):
    """(image, operations, magnitudes, signs, results of timm, our results) for one photo."""
    with np.load(ROOT / "tests/golden/randaugment.npz") as arrays:
        image = arrays[request.param]
        names = [name for name in arrays.files if name.startswith(f"{request.param}/")]
        expected = np.stack([arrays[name] for name in names])
    settings = [name.split("/")[1:] for name in names]
    op = np.array([TIMM[name] for name, _, _ in settings], np.int32)
    magnitude = np.array([float(value) for _, value, _ in settings], np.float32)
    sign = np.array([float(f"{sign}1") for _, _, sign in settings], np.float32)
    ours = jax.jit(lambda *arguments: apply(*arguments, FILL))(
        np.stack([image] * len(op)), op, magnitude, sign
    )
    return image, op, magnitude, sign, expected, np.asarray(ours)


def test_timms_set_is_complete():
    assert sorted(TIMM.values()) == [op for op in Op if op != Op.NONE]
    assert len(TIMM) == 15


def test_tables_and_blends_equal_pillows_pixels(golden):
    image, op, _, _, expected, ours = golden
    exact = ~np.isin(op, WARPS)
    assert exact.sum() > 30
    np.testing.assert_array_equal(ours[exact], expected[exact])
    assert all((after != image).any() for after in expected[exact])


def test_warps_are_pillows_but_for_rounding(golden):
    _, op, magnitude, sign, expected, ours = golden
    warps = np.isin(op, WARPS)
    settings = {tuple(setting) for setting in zip(op[warps], magnitude[warps], sign[warps], strict=True)}
    assert len(settings) == 5 * 3 * 2
    difference = np.abs(ours[warps].astype(int) - expected[warps])
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3  # Pillow computes in double, here float32 does


def test_autocontrast_stretches_every_range_as_pillow_does():
    from PIL import Image, ImageOps

    pairs = [(low, high) for low in range(0, 256, 5) for high in range(low, 256, 3)]
    images = np.zeros((len(pairs), 1, 256, 3), np.uint8)
    for image, (low, high) in zip(images, pairs, strict=True):
        image[:] = np.clip(np.arange(256), low, high)[:, None]
    expected = np.stack([np.asarray(ImageOps.autocontrast(Image.fromarray(image))) for image in images])
    tables = jax.jit(image_ops.autocontrast_tables)(images)
    np.testing.assert_array_equal(image_ops.look_up(images, tables), expected)


@pytest.mark.parametrize("values", [(7,), (7, 200), tuple(range(256))])
def test_equalize_of_plain_images_is_pillows(values):
    from PIL import Image, ImageOps

    image = np.resize(np.array(values, np.uint8), (30, 30, 3))
    expected = np.asarray(ImageOps.equalize(Image.fromarray(image)))
    ours = image_ops.look_up(image[None], image_ops.equalize_tables(image[None]))
    np.testing.assert_array_equal(ours[0], expected)


def test_no_bits_left_is_black_and_none_changes_nothing():
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 3), dtype=np.uint8)
    op = np.array([Op.POSTERIZE, Op.POSTERIZE, Op.NONE], np.int32)
    ours = one_layer(images, op, np.float32([10, 9, 9]), np.ones(3, np.float32))
    np.testing.assert_array_equal(ours, [np.zeros_like(images[0]), images[1] & 128, images[2]])


@pytest.mark.parametrize("num_ops", [1, 3])
def test_draws_follow_their_definition(num_ops):
    rows = 20000
    op, magnitude, sign = (np.asarray(x) for x in draw(jax.random.key(0), rows, 9.0, 0.5, num_ops))
    assert op.shape == magnitude.shape == sign.shape == (rows, num_ops)
    for layer in range(num_ops):
        counts = np.array([(op[:, layer] == which).mean() for which in Op])
        probability = np.array([0.5] + [0.5 / 15] * 15)
        assert (np.abs(counts - probability) < 4 * np.sqrt(probability * (1 - probability) / rows)).all()
    assert set(np.unique(sign)) == {-1.0, 1.0}
    assert abs(sign.mean()) < 4 / np.sqrt(sign.size)
    assert magnitude.max() == 10.0
    assert abs((magnitude == 10.0).mean() - 0.02275) < 4 * np.sqrt(0.02275 / magnitude.size)  # 2 sigma up
    free = magnitude[magnitude < 9.0]  # half of a normal distribution
    assert abs(len(free) / magnitude.size - 0.5) < 4 * 0.5 / np.sqrt(magnitude.size)
    assert abs(np.mean((free - 9) ** 2) - 0.25) < 0.01
    if num_ops > 1:  # layers draw on their own, with replacement
        both = (op[:, 0] != Op.NONE) & (op[:, 1] != Op.NONE)
        assert abs(both.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / rows)
        assert abs((op[both, 0] == op[both, 1]).mean() - 1 / 15) < 4 * np.sqrt(1 / 15 / both.sum())


def test_a_magnitude_without_noise_is_itself():
    _, magnitude, _ = draw(jax.random.key(0), 10, 7.0, 0.0, 2)
    np.testing.assert_array_equal(magnitude, np.full((10, 2), 7.0))


def test_randaugment_applies_what_it_draws_one_layer_after_the_other():
    images = np.random.default_rng(0).integers(0, 256, (60, 9, 12, 3), dtype=np.uint8)
    key, options = jax.random.key(5), dict(magnitude=9.0, magnitude_std=0.5, num_ops=2, fill=FILL)
    draws = draw(key, 60, 9.0, 0.5, 2)
    expected = images
    for layer in range(2):
        expected = one_layer(expected, *(values[:, layer] for values in draws))
    ours = jax.jit(lambda images: randaugment(images, key, **options))(images)
    np.testing.assert_array_equal(ours, expected)
    assert ours.dtype == jnp.uint8


@pytest.mark.parametrize("rows", [1, 7, 32, 48])
@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_some_rows_is_the_function_in_the_rows_that_are_wanted(rows, share):
    wanted = np.random.default_rng(rows).uniform(size=rows) < share
    batch, scale = np.arange(1.0, 1.0 + rows * 2).reshape(rows, 2), np.arange(2.0, 2.0 + rows)
    function = jax.jit(lambda *rows: image_ops.some_rows(lambda x, s: x.sum(1) * s, *rows))
    ours = np.asarray(function(wanted, batch, scale))
    np.testing.assert_array_equal(ours[wanted], (batch.sum(1) * scale)[wanted])
    rounds = max((group.sum() for group in wanted.reshape(-1, math.gcd(rows, 16))), default=0)
    assert (ours != 0).sum() <= rounds * rows // math.gcd(rows, 16)  # the work that was done
