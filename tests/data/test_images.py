"""Decoding of every kind of file, random and central crops, resizing."""

import io
import itertools
import resource

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from scipy.stats import ks_2samp, kstest
from sklearn.datasets import load_sample_image

from convit_jax.data import images
from convit_jax.data.images import centre_crop, decode, random_resized_crop_box
from convit_jax.errors import UserError


def encoded(image, kind, **settings):
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def damaged_avif():
    """An AVIF file whose picture begins with zeros, for which Pillow raises RuntimeError."""
    avif = bytearray(encoded(NOISE, "AVIF"))
    start = avif.index(b"mdat") + 4
    avif[start : start + 200] = bytes(200)
    return bytes(avif)


IN_COLOUR, IN_GREY = (200, 100, 50), (124, 124, 124)
COLOUR = Image.new("RGB", (6, 4), IN_COLOUR)
DEEP = Image.fromarray(np.full((4, 6), 9000, np.uint16))
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
ROTATED = Image.Exif()
ROTATED[0x0112] = 6  # orientation: turn by 90 degrees

KINDS = {
    "png": (COLOUR, "PNG", {}, IN_COLOUR),
    "jpeg with orientation": (COLOUR, "JPEG", dict(quality=95, exif=ROTATED), IN_COLOUR),
    "webp": (COLOUR, "WEBP", dict(lossless=True), IN_COLOUR),
    "grey": (COLOUR.convert("L"), "PNG", {}, IN_GREY),
    "grey with alpha": (COLOUR.convert("LA"), "PNG", {}, IN_GREY),
    "grey of 16 bits": (DEEP, "PNG", {}, (35, 35, 35)),  # 9000 / 256
    "tiff of 16 bits": (DEEP, "TIFF", {}, (35, 35, 35)),
    "pgm of 16 bits": (DEEP, "PPM", {}, (35, 35, 35)),
    "tiff of 32 bits": (Image.fromarray(np.full((4, 6), 124, np.int32)), "TIFF", {}, IN_GREY),
    "tiff of floats": (Image.fromarray(np.full((4, 6), 124, np.float32)), "TIFF", {}, IN_GREY),
    "palette with alpha": (COLOUR.quantize(4), "PNG", dict(transparency=bytes([128])), IN_COLOUR),
    "black and white": (Image.new("1", (6, 4), 1), "PNG", {}, (255, 255, 255)),
    "rgba": (Image.new("RGBA", (6, 4), (*IN_COLOUR, 0)), "PNG", {}, IN_COLOUR),
    "cmyk": (COLOUR.convert("CMYK"), "JPEG", dict(quality=95), IN_COLOUR),
}

BROKEN = {
    "truncated jpeg": (encoded(NOISE, "JPEG")[:-600], "truncated"),
    "truncated png": (encoded(COLOUR, "PNG")[:-30], ""),
    "text": (b"404: not found", "unknown image format"),
    "empty": (b"", "unknown image format"),
    "avif with a hole": (damaged_avif(), ""),
    "bomb": (encoded(NOISE, "PNG"), "decompression bomb"),
}


def refuse(*_):
    """Leaves a JPEG file to Pillow."""
    raise ValueError


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_decodes_to_uint8_rgb(kind, monkeypatch):
    image, file_format, settings, colour = KINDS[kind]
    record = encoded(image, file_format, **settings)
    pixels = decode(record, "a/1.jpg")
    assert (pixels.dtype, pixels.shape) == (np.uint8, (4, 6, 3))
    assert np.abs(pixels.astype(int) - colour).max() <= 3
    monkeypatch.setattr(images.simplejpeg, "decode_jpeg", refuse)
    np.testing.assert_array_equal(decode(record, "a/1.jpg"), pixels)


@pytest.mark.parametrize("settings", [{}, {"subsampling": 0}, {"progressive": True, "quality": 30}, {"mode": "L"}])
def test_jpeg_files_have_pillows_pixels(settings, monkeypatch):
    mode = settings.get("mode", "RGB")
    photo = Image.fromarray(load_sample_image("flower.jpg")[:101, 200:337]).convert(mode)
    record = encoded(photo, "JPEG", **{name: value for name, value in settings.items() if name != "mode"})
    pixels = decode(record, "a/1.jpg")
    monkeypatch.setattr(images.simplejpeg, "decode_jpeg", refuse)
    np.testing.assert_array_equal(decode(record, "a/1.jpg"), pixels)


def test_a_deep_image_without_contrast_is_reported_once(monkeypatch, capsys):
    monkeypatch.setattr(images, "_flat", [])
    ramp = np.linspace(0, 1, 64, dtype=np.float32)[None]
    for name, pixels in (("full", ramp * 255), ("scan", ramp), ("more", (ramp * 4095).astype(np.uint16))):
        decode(encoded(Image.fromarray(pixels), "TIFF"), f"{name}.tif")
    assert capsys.readouterr().err.startswith("Warning: scan.tif (mode F) has 2 of 256 grey levels in 8 bits: rescale")


@pytest.mark.parametrize("kind", BROKEN)
def test_a_damaged_file_is_refused_by_name(kind, monkeypatch):
    record, reason = BROKEN[kind]
    if kind == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    message = rf"the image dog/7\.jpg \([^<>]*{reason}[^<>]*\): replace or remove the file\.$"
    with pytest.raises(UserError, match=message):
        decode(record, "dog/7.jpg")


def test_random_crops_have_the_areas_aspects_and_places_of_the_definition():
    width, height, rng = 120, 90, np.random.default_rng(0)
    left, top, right, bottom = np.array([random_resized_crop_box(width, height, rng) for _ in range(4000)]).T
    assert (left.min(), top.min(), right.max(), bottom.max()) == (0, 0, width, height)
    w, h = right - left, bottom - top
    # Area and log aspect are uniform, drawn again until the crop fits.
    area = width * height * rng.uniform(0.08, 1.0, 32_000)
    aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), 32_000))
    sizes = np.rint([np.sqrt(area * aspect), np.sqrt(area / aspect)])
    expected_w, expected_h = sizes[:, (sizes[0] <= width) & (sizes[1] <= height)]
    assert ks_2samp(w * h, expected_w * expected_h).pvalue > 0.01
    assert ks_2samp(w / h, expected_w / expected_h).pvalue > 0.01
    for corner, room in ((left, width - w), (top, height - h)):  # uniform on 0 .. room
        assert kstest((corner + rng.uniform(size=4000)) / (room + 1), "uniform").pvalue > 0.01


@pytest.mark.parametrize(  # 13 = round(10 * 4 / 3)
    ("width", "height", "box"),
    [(1000, 10, (493, 0, 506, 10)), (10, 1000, (0, 493, 10, 506)), (1, 400, (0, 199, 1, 200)), (1, 1, (0, 0, 1, 1))],
)
def test_images_too_narrow_for_any_crop_fall_back_to_the_central_one(width, height, box):
    rng = np.random.default_rng(0)
    assert {random_resized_crop_box(width, height, rng) for _ in range(50)} == {box}


@pytest.mark.parametrize(
    ("width", "height", "size", "crop_ratio", "resized"),
    [
        (448, 320, (160, 224), 0.8, (280, 200)),
        (210, 140, (224, 224), 0.875, (384, 256)),
        (640, 427, (224, 224), 0.875, (383, 256)),  # 383.7, cut as torchvision's Resize does
        (500, 375, (224, 224), 0.9, (330, 248)),  # 248.9, cut as timm does; 330.7
    ],
)
def test_the_centre_crop_equals_resizing_the_short_side_and_cropping(width, height, size, crop_ratio, resized):
    image = Image.fromarray(load_sample_image("china.jpg")).crop((0, 0, width, height))
    left = round((resized[0] - size[1]) / 2)  # torchvision's CenterCrop
    top = round((resized[1] - size[0]) / 2)
    crop = image.resize(resized, Image.Resampling.BICUBIC).crop((left, top, left + size[1], top + size[0]))
    np.testing.assert_array_equal(centre_crop(np.asarray(image), size, crop_ratio), np.asarray(crop))


def test_the_centre_crop_never_leaves_the_image():
    ratios, sizes = (1.0, 0.9, 0.875), ((8, 8), (9, 14))
    for width, height, size, crop_ratio in itertools.product(range(1, 80, 2), (1, 7, 50), sizes, ratios):
        crop = centre_crop(np.full((height, width, 3), 200, np.uint8), size, crop_ratio)
        assert (crop.shape, crop.min()) == ((*size, 3), 200)  # no black from outside


@pytest.mark.parametrize("size", [(30_000, 1), (1, 30_000)])
def test_a_strip_is_cut_before_it_is_resized(size):
    crop = centre_crop(np.full((*size, 3), 200, np.uint8), (224, 224), 0.875)
    assert (crop.shape, crop.min(), crop.max()) == ((224, 224, 3), 200, 200)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 3e6  # KiB; the whole would take 5.9 GB


def test_a_png_with_megabytes_of_text_decodes():
    info = PngInfo()
    info.add_text("parameters", "x" * 3_000_000, zip=True)
    assert decode(encoded(COLOUR, "PNG", pnginfo=info), "a.png").shape == (4, 6, 3)
