"""Decoding of every kind of file, random and central crops, resizing."""

import io

import numpy as np
import pytest
from PIL import Image
from scipy.stats import ks_2samp, kstest
from sklearn.datasets import load_sample_image

from convit_jax.data.loader import (
    centre_crop_box,
    decode,
    fit,
    random_resized_crop_box,
)
from convit_jax.errors import UserError


def encoded(image, kind, **settings):
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


IN_COLOUR, IN_GREY = (200, 100, 50), (124, 124, 124)
COLOUR = Image.new("RGB", (6, 4), (200, 100, 50))
CLEAR = Image.new("RGBA", (6, 4), (200, 100, 50, 0))
DEEP = Image.fromarray(np.full((4, 6), 9000, np.uint16))
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))


KINDS = {
    "png": (encoded(COLOUR, "PNG"), IN_COLOUR),
    "jpeg": (encoded(COLOUR, "JPEG", quality=95), IN_COLOUR),
    "webp": (encoded(COLOUR, "WEBP", lossless=True), IN_COLOUR),
    "grey png": (encoded(COLOUR.convert("L"), "PNG"), IN_GREY),
    "grey jpeg": (encoded(COLOUR.convert("L"), "JPEG"), IN_GREY),
    "grey with alpha": (encoded(COLOUR.convert("LA"), "PNG"), IN_GREY),
    "grey of 16 bits": (encoded(DEEP, "PNG"), (35, 35, 35)),  # 9000 / 256
    "tiff of 16 bits": (encoded(DEEP, "TIFF"), (35, 35, 35)),
    "pgm of 16 bits": (b"P5 6 4 65535\n" + np.full(24, 9000, ">u2").tobytes(), (35, 35, 35)),
    "palette with alpha": (encoded(COLOUR.quantize(4), "PNG", transparency=bytes([128])), IN_COLOUR),
    "black and white": (encoded(COLOUR.convert("1"), "PNG"), None),
    "palette": (encoded(COLOUR.quantize(4), "PNG"), IN_COLOUR),
    "rgba": (encoded(CLEAR, "PNG"), IN_COLOUR),
    "cmyk jpeg": (encoded(COLOUR.convert("CMYK"), "JPEG", quality=95), IN_COLOUR),
    "cmyk tiff": (encoded(COLOUR.convert("CMYK"), "TIFF"), IN_COLOUR),
}


BROKEN = {
    "truncated jpeg": encoded(NOISE, "JPEG")[:-600],
    "truncated png": encoded(COLOUR, "PNG")[:-30],
    "header of a jpeg": encoded(COLOUR, "JPEG")[:10],
    "header of a gif": b"GIF89a",
    "nothing": b"",
    "text": b"404: not found",
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_decodes_to_uint8_rgb(kind):
    record, colour = KINDS[kind]
    pixels = np.asarray(decode(record, "a/1.jpg"))
    assert (pixels.dtype, pixels.shape) == (np.uint8, (4, 6, 3))
    if colour is not None:
        assert np.abs(pixels.astype(int) - colour).max() <= 3


def test_an_array_is_already_decoded():
    pixels = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    np.testing.assert_array_equal(decode(pixels, "4"), pixels)


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_is_no_image_is_refused_by_name(kind):
    with pytest.raises(UserError, match=r"the image dog/7\.jpg .*: replace or remove the file\.$"):
        decode(BROKEN[kind], "dog/7.jpg")
    with pytest.raises(UserError, match=r"^[^<>]*$"):  # no Python object in the message
        decode(BROKEN[kind], "dog/7.jpg")


def defined_crops(width, height, count, scale, ratio):
    """Sizes (w, h) by the definition: area and log aspect uniform, drawn again until the crop fits."""
    rng = np.random.default_rng(1)
    area = width * height * rng.uniform(*scale, 8 * count)
    aspect = np.exp(rng.uniform(*np.log(ratio), 8 * count))
    sizes = np.stack([np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))], axis=1)
    return sizes[(sizes <= (width, height)).all(axis=1)][:count]


@pytest.mark.parametrize(
    ("width", "height", "settings"),
    [(120, 90, {}), (75, 100, {}), (90, 90, dict(scale=(0.3, 0.5), ratio=(0.5, 2.0)))],
)
def test_random_crops_have_the_areas_aspects_and_places_of_the_definition(width, height, settings):
    rng = np.random.default_rng(0)
    boxes = np.array([random_resized_crop_box(width, height, rng, **settings) for _ in range(4000)])
    left, top, right, bottom = boxes.T
    assert (boxes >= 0).all()
    assert (right <= width).all()
    assert (bottom <= height).all()
    w, h = right - left, bottom - top
    expected = defined_crops(
        width, height, 4000, **{"scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3), **settings}
    ).T
    assert ks_2samp(w * h, expected[0] * expected[1]).pvalue > 0.01
    assert ks_2samp(w / h, expected[0] / expected[1]).pvalue > 0.01
    for corner, room in ((left, width - w), (top, height - h)):  # uniform on 0 .. room
        assert kstest((corner + rng.uniform(size=4000)) / (room + 1), "uniform").pvalue > 0.01


@pytest.mark.parametrize(
    ("width", "height", "box"),
    [
        (1000, 10, (493, 0, 506, 10)),  # 13 = round(10 * 4 / 3) wide
        (10, 1000, (0, 493, 10, 506)),  # 13 = round(10 / (3 / 4)) high
        (1, 400, (0, 199, 1, 200)),
        (1, 1, (0, 0, 1, 1)),
    ],
)
def test_images_too_narrow_for_any_crop_fall_back_to_the_central_one(width, height, box):
    rng = np.random.default_rng(0)
    assert {random_resized_crop_box(width, height, rng) for _ in range(50)} == {box}


@pytest.mark.parametrize(
    ("width", "height", "size", "crop_ratio"),
    [
        (630, 420, (224, 224), 0.875),  # resized to 384 x 256
        (280, 420, (224, 224), 0.875),  # 256 x 384
        (400, 400, (96, 96), 0.75),  # 128 x 128
        (448, 320, (160, 224), 0.8),  # 280 x 200
        (630, 420, (224, 224), 1.0),  # 336 x 224
        (210, 140, (224, 224), 0.875),  # enlarged to 384 x 256
        (640, 427, (224, 224), 0.875),  # 383.7 x 256, rounded to 384
    ],
)
@pytest.mark.parametrize("photo", ["china.jpg", "flower.jpg"])
def test_the_centre_crop_equals_resizing_the_short_side_and_cropping(photo, width, height, size, crop_ratio):
    image = Image.fromarray(load_sample_image(photo)).crop((0, 0, width, height))
    scale = max(round(size[0] / crop_ratio) / height, round(size[1] / crop_ratio) / width)
    resized = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
    left, top = round((resized.width - size[1]) / 2), round((resized.height - size[0]) / 2)
    literal = np.asarray(resized.crop((left, top, left + size[1], top + size[0])))
    ours = fit(image, size, centre_crop_box(width, height, size, crop_ratio))
    assert ours.shape == (*size, 3)
    assert np.sqrt(np.mean((ours.astype(float) - literal) ** 2)) < 2.55  # a PSNR of 40 dB


@pytest.mark.parametrize("crop_ratio", [1.0, 0.875])
@pytest.mark.parametrize("size", [224, 384])
def test_the_centre_crop_of_no_image_leaves_its_borders(size, crop_ratio):
    image = Image.new("RGB", (1300, 1300))
    for side in range(1, 1300):
        left, top, right, bottom = centre_crop_box(side, side, (size, size), crop_ratio)
        assert left >= 0 <= top
        assert right <= side >= bottom
    assert fit(image.crop((0, 0, 253, 253)), (224, 224), centre_crop_box(253, 253, (224, 224), 1.0)).shape


@pytest.mark.parametrize("as_array", [True, False], ids=["array", "image"])
def test_an_image_of_the_right_size_passes_untouched(as_array):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    image = pixels if as_array else Image.fromarray(pixels)
    np.testing.assert_array_equal(fit(image, (24, 32), centre_crop_box(32, 24, (24, 32), 1.0)), pixels)


def test_arrays_and_images_are_fitted_alike():
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    for size in ((16, 16), (24, 32)):
        box = centre_crop_box(32, 24, size, 0.875)
        fitted = fit(pixels, size, box)
        assert (fitted.dtype, fitted.shape) == (np.uint8, (*size, 3))
        assert size == (16, 16) or (fitted != pixels).any()
        np.testing.assert_array_equal(fitted, fit(Image.fromarray(pixels), size, box))


def test_the_part_of_an_image_outside_the_box_hardly_counts():
    pixels = np.zeros((40, 40, 3), np.uint8)
    pixels[10:30, 20:40] = 255
    assert fit(Image.fromarray(pixels), (8, 8), (22, 12, 38, 28)).min() == 255
    assert fit(Image.fromarray(pixels), (8, 8), (0, 0, 18, 40)).max() == 0
