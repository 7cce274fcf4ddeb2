"""One image on the host, uint8 [height, width, 3]: decode, choose a crop, resize with Pillow."""

import contextlib
import io
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from convit_jax.errors import UserError, explained

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


class Axis(NamedTuple):
    """What is shown along one axis of an image: `length` pixels, resized to `resized`, without the `first` of these."""

    start: int  # of the length, in the image
    length: int
    resized: int
    first: int = 0


View = tuple[Axis, Axis]  # of the rows, of the columns

PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # some programs store megabytes of text
LONG = 16  # aspect of views beyond which only what is shown is resized

AREA = (0.08, 1.0)  # of a random crop, share of the image
NARROWEST, WIDEST = 3 / 4, 4 / 3  # of a random crop, width / height

in_worker = False  # this process is a worker of the loader, which sets it
_flat: list[str] = []  # the image that was warned of; one stands for all


def decode(record: bytes | np.ndarray, name: str) -> np.ndarray:
    """Returns the pixels of an image file, or those that are given; raises UserError if the file is damaged.

    As in timm and torchvision, alpha is dropped, the EXIF orientation is ignored, and values of 32-bit images
    are clipped to 0..255. 16-bit images keep their upper eight bits.
    """
    if isinstance(record, np.ndarray):
        return record
    try:
        with Image.open(io.BytesIO(record)) as image:
            if image.format == "JPEG" and image.mode in ("RGB", "L"):  # takes half of Pillow's time
                with contextlib.suppress(ValueError):  # of a damaged file, which Pillow describes
                    return simplejpeg.decode_jpeg(record)
            return to_rgb(image, name)
    except Exception as error:  # decoders raise all kinds for damaged files
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "unknown image format" if unknown else str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"cannot decode the image {name} ({reason}): replace or remove the file.") from error


def open_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Returns the pixels of a file, as `decode`. Raises UserError if it cannot be read or is damaged."""
    with explained(path):
        record = Path(path).expanduser().read_bytes()
    return decode(record, str(path))


def to_rgb(image: Image.Image, name: str = "an image") -> np.ndarray:
    """Returns the pixels of a Pillow image, as `decode` describes.

    Warns once of an image that has lost its contrast; the loader's workers leave that to the main process.
    """
    image.load()
    pixels = np.asarray(image if image.mode == "RGB" else _converted(image))
    if image.mode[0] in "IF" and not (_flat or in_worker):
        levels = int(np.ptp(pixels)) + 1
        if levels < 256 / 10:
            _flat.append(name)
            found = f"{name} (mode {image.mode}) has {levels} of 256 grey levels in 8 bits"
            print(f"Warning: {found}: rescale such images to the full range.", file=sys.stderr, flush=True)
    return pixels


def _converted(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM"):  # not to be clipped
        upper = np.clip(np.asarray(image) >> 8, 0, 255).astype(np.uint8)
        return Image.fromarray(upper).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:  # converted directly, Pillow warns
        image = image.convert("RGBA")
    return image.convert("RGB")


def random_resized_crop_box(width: int, height: int, rng: np.random.Generator) -> Box:
    """Draws the box of a random resized crop, as torchvision's `RandomResizedCrop` and timm's.

    The area and the logarithm of the aspect are uniform. If none of ten draws fits into the image of width x
    height pixels, the box is the largest central one with an allowed aspect.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*AREA)
        aspect = math.exp(rng.uniform(math.log(NARROWEST), math.log(WIDEST)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    h = round(width / NARROWEST) if width / height < NARROWEST else height
    w = round(height * WIDEST) if width / height > WIDEST else width
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def centre_view(pixels: np.ndarray, size: tuple[int, int], crop_ratio: float) -> View:
    """Returns what evaluation shows: the short side is resized to size / crop_ratio, and the centre cut out.

    Sizes are rounded as torchvision's `Resize` and `CenterCrop` round them, as in timm's `transforms_imagenet_eval`.
    size is the (height, width) of the result.
    """
    (h, w), (height, width, _) = size, pixels.shape
    short_h, short_w = math.floor(h / crop_ratio), math.floor(w / crop_ratio)
    if short_w * height >= short_h * width:  # the width is the short side
        resized_h, resized_w = max(short_h, short_w * height // width), short_w
    else:
        resized_h, resized_w = short_h, max(short_w, short_h * width // height)
    top, left = round((resized_h - h) / 2), round((resized_w - w) / 2)
    return Axis(0, height, resized_h, top), Axis(0, width, resized_w, left)


def centre_crop(
    pixels: np.ndarray, size: tuple[int, int], crop_ratio: float, interpolation: str = "bicubic"
) -> np.ndarray:
    """Returns what evaluation shows of an image (`centre_view`): uint8 [height, width, 3] for size (height, width)."""
    return show(pixels, size, centre_view(pixels, size, crop_ratio), interpolation)


def show(pixels: np.ndarray, size: tuple[int, int], view: View, interpolation: str = "bicubic") -> np.ndarray:
    """Returns a view of an image, resized with antialiasing: uint8 [height, width, 3] for size (height, width).

    Resampling only what is shown would be a third faster but gives other pixels, because Pillow orders its two
    passes by cost; only views longer than LONG to 1 are resized so, which bounds the memory.
    """
    (h, w), (y, x) = size, view
    method = Image.Resampling[interpolation.upper()]
    if is_long(view):
        scale_x, scale_y = x.length / x.resized, y.length / y.resized
        box = x.first * scale_x, y.first * scale_y, (x.first + w) * scale_x, (y.first + h) * scale_y
        return np.asarray(Image.fromarray(pixels).resize((w, h), method, box))
    shown = Image.fromarray(pixels[y.start : y.start + y.length, x.start : x.start + x.length])
    resized = np.asarray(shown.resize((x.resized, y.resized), method))
    return resized[y.first : y.first + h, x.first : x.first + w]


def is_long(view: View) -> bool:
    """Returns whether the length of one axis of a view is more than LONG times that of the other."""
    y, x = view
    return max(y.length, x.length) > LONG * min(y.length, x.length)
