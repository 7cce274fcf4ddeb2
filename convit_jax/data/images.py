"""One image on the host: decoding, the boxes of random and central crops, resizing; all with Pillow."""

import io
import math

import numpy as np
from PIL import Image, UnidentifiedImageError

from convit_jax.errors import UserError


def decode(record, name):
    """A record of a source as a PIL image in RGB, or as the uint8 array that it already is.

    As timm and torchvision do it: alpha is dropped, EXIF's orientation is ignored.
    """
    if isinstance(record, np.ndarray):
        return record
    try:
        with Image.open(io.BytesIO(record)) as image:
            image.load()
            if image.mode == "RGB":
                return image
            if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip at 255
                image = Image.fromarray(np.clip(np.asarray(image) >> 8, 0, 255).astype(np.uint8))
            elif image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")  # else Pillow warns
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "of no known format" if isinstance(error, UnidentifiedImageError) else error
        reason = reason if record else "it is empty, 0 bytes"
        raise UserError(f"cannot decode the image {name} ({reason}): replace or remove the file.") from error


def random_resized_crop_box(width, height, rng, *, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    """(left, top, right, bottom) of torchvision's RandomResizedCrop in an image of width x height pixels."""
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = width, height  # no luck: the central crop nearest in shape
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def centre_crop(image, size, crop_ratio, interpolation="bicubic"):
    """Resize the short side to size / crop_ratio, then cut the centre of size (h, w): uint8 [h, w, 3].

    Rounded as torchvision and timm round, and in two passes as they do: one resampling of the box that
    remains is faster by a third but not the same, since Pillow orders its passes by cost.
    """
    (h, w), (width, height) = size, width_height(image)
    short_h, short_w = math.floor(h / crop_ratio), math.floor(w / crop_ratio)
    if short_w * height >= short_h * width:  # the width is the short side
        resized_h, resized_w = max(short_h, short_w * height // width), short_w
    else:
        resized_h, resized_w = short_h, max(short_w, short_h * width // height)
    resized = crop_resize(image, (resized_h, resized_w), (0, 0, width, height), interpolation)
    top, left = round((resized_h - h) / 2), round((resized_w - w) / 2)
    return resized[top : top + h, left : left + w]


def crop_resize(image, size, box, interpolation="bicubic"):
    """Cut box (left, top, right, bottom) out of an image and resize it, with antialiasing.

    size: (h, w) of the result, uint8 [h, w, 3]. interpolation: one of Pillow's, in lower case.
    """
    width, height = width_height(image)
    whole = tuple(box) == (0, 0, width, height)
    if whole and (height, width) == tuple(size):
        return np.asarray(image)
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    cut = image if whole else image.crop(box)
    return np.asarray(cut.resize((size[1], size[0]), Image.Resampling[interpolation.upper()]))


def width_height(image):
    """(width, height) of a PIL image or an array [H, W, 3]."""
    return (image.shape[1], image.shape[0]) if isinstance(image, np.ndarray) else image.size
