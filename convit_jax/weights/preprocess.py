"""Images to the inputs of a model."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from convit_jax.data.augment import normalize
from convit_jax.data.images import centre_crop, open_image, to_rgb
from convit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How an image becomes an input: resize, crop the centre, (x - mean) / std."""

    crop_ratio: float = 0.875  # side of the crop / short side of the resized image
    interpolation: str = "bicubic"  # a Pillow filter
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # of each channel, for pixels in 0..1
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    @classmethod
    def of_config(cls, data: Mapping[str, Any]) -> "Preprocessing":
        """Returns that of a config's section `data`, which in older runs lacks a field."""
        return cls(**{field.name: data[field.name] for field in dataclasses.fields(cls) if field.name in data})

    def __post_init__(self) -> None:
        for name in ("mean", "std"):  # JSON has lists
            object.__setattr__(self, name, tuple(map(float, getattr(self, name))))
        if not (self.crop_ratio > 0 and all(value > 0 for value in self.std)):
            raise UserError(f"the weights' crop_ratio is {self.crop_ratio} and std {self.std}: both must be above 0.")
        filters = [name.lower() for name in Image.Resampling.__members__]
        if self.interpolation not in filters:
            known = ", ".join(filters)
            raise UserError(f"the weights' interpolation is {self.interpolation!r}: it must be one of {known}.")

    def __str__(self) -> str:
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return f"crop {self.crop_ratio:g}, {self.interpolation}, mean {mean}, std {std}"


def usual_crop_ratio(image_size: tuple[int, int]) -> float:
    """Returns the recipe's crop_ratio; images of 32 px and less are not cropped, as by the authors."""
    return 1.0 if max(image_size) <= 32 else Preprocessing.crop_ratio


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """A function from images to a model's input, made for a preprocessing and an image size."""

    how: Preprocessing
    size: tuple[int, int]  # (height, width) of the model's images

    def __call__(self, images: Any) -> jax.Array:
        """Returns float32 [B, height, width, 3], normalised, of an image or a list of images.

        Args:
          images: each a path, a Pillow image, or uint8 [H, W, 3] of any size; also uint8 [B, H, W, 3].

        Raises:
          UserError: a file that cannot be read, or an array of another kind.
        """
        is_batch = isinstance(images, list | tuple) or (isinstance(images, np.ndarray | jax.Array) and images.ndim == 4)
        pixels = [
            centre_crop(_pixels(image), self.size, self.how.crop_ratio, self.how.interpolation)
            for image in (images if is_batch else [images])
        ]
        return normalize(jnp.asarray(np.stack(pixels)), self.how.mean, self.how.std)


def _pixels(image: Any) -> np.ndarray:
    if isinstance(image, str | os.PathLike):
        return open_image(image)
    if isinstance(image, Image.Image):
        return to_rgb(image)
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise UserError(
            f"an image is {image.dtype} {list(image.shape)}: give a path, a Pillow image, or uint8 [H, W, 3]."
        )
    return image
