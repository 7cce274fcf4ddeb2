"""Weights with their settings, from a file, a converted directory, one from the Hub, or a run.

Tensors keep the original's names and the file's dtype until a model takes them, so that exporting gives
back the same tensors.
"""

import contextlib
import dataclasses
import functools
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from convit_jax.data.class_names import IMAGENET
from convit_jax.errors import UserError
from convit_jax.models.variants import abstract_model, model_settings
from convit_jax.models.vit import VisionTransformer
from convit_jax.rundir import atomic_write
from convit_jax.weights import names
from convit_jax.weights.architecture import infer
from convit_jax.weights.checkpoint_file import SAFETENSORS, read_state_dict

INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")  # Pillow's


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How an image becomes an input: resize, crop the centre, (x - mean) / std.

    Attributes:
      crop_ratio: side of the crop / short side of the resized image.
      interpolation: of the resizing, one of `INTERPOLATIONS`.
      mean: of each channel, for pixels in 0..1.
      std: of each channel.
    """

    crop_ratio: float = 0.875
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def words(self) -> str:
        """Returns a description for people."""
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return f"crop {self.crop_ratio:g}, {self.interpolation}, mean {mean}, std {std}"

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            raise UserError(
                f"the weights ask for interpolation {self.interpolation!r}: "
                f"set one of {', '.join(INTERPOLATIONS)} in their config.json."
            )


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Weights with what belongs to them.

    Attributes:
      tensors: {name: array} with the original's names and layouts, and the file's dtypes.
      settings: arguments of VisionTransformer, as of model_settings().
      preprocessing: of the images that the network was trained for.
      class_names: of each label (ImageNet: WordNet ids), or None.
      source: where the weights are from.
      changes: what was done to the weights since, for people.
    """

    tensors: Mapping[str, np.ndarray]
    settings: dict[str, Any]
    preprocessing: Preprocessing
    class_names: tuple[str, ...] | None
    source: str
    changes: tuple[str, ...] = ()

    @functools.cached_property
    def network(self) -> tuple[nnx.GraphDef, dict[str, Any]]:
        """The (graphdef, shapes of the parameters) that models.variants.abstract_model gives."""
        return abstract_model(self.settings)

    def params(self) -> dict[str, Any]:
        """Returns the network's parameters, a nested dict of float32 numpy arrays."""
        return names.to_params(self.tensors, self.network[1])

    def model(self) -> VisionTransformer:
        """Returns the model."""
        return nnx.merge(self.network[0], names.to_params(self.tensors, self.network[1], jax.device_put))

    def class_name(self, label: int) -> str:
        """Returns the name of a class, "class 7" if it has none."""
        names = self.class_names or ()
        return names[label] if label < len(names) else f"class {label}"


def from_state_dict(
    tensors: Mapping[str, np.ndarray],
    source: str,
    wanted: Mapping[str, Any],
    *,
    trained_at: tuple[int, int] | None = None,
    preprocessing: Preprocessing | None = None,
    class_names: tuple[str, ...] | None = None,
) -> Pretrained:
    """Returns the Pretrained of a state dict: the architecture is inferred, preprocessing is the recipe's.

    Args:
      tensors: {name: array} with the original's names.
      source: where they are from.
      wanted: num_heads, num_classes and image_size of the caller, for `infer`.
      trained_at: (height, width) in pixels of the training images, if known.
      preprocessing: instead of the recipe's.
      class_names: of each label; by default ImageNet's if there are 1,000.
    """
    settings = infer(tensors, source, trained_at=trained_at, **wanted)
    if preprocessing is None:  # the authors do not resize images of 32 pixels or less
        preprocessing = Preprocessing(crop_ratio=0.875 if max(settings["image_size"]) > 32 else 1.0)
    if class_names is None and settings["num_classes"] == len(IMAGENET):
        class_names = tuple(IMAGENET)
    return Pretrained(tensors, settings, preprocessing, class_names, source)


def from_hub(path: Path, file: Path, source: str, wanted: Mapping[str, Any]) -> Pretrained:
    """Returns the Pretrained of a directory with timm's config.json and a file of weights."""
    with _json_explained(path / "config.json") as config:
        config = {**config, **config.get("pretrained_cfg", {})}
        fields = {"crop_ratio": "crop_pct", "interpolation": "interpolation", "mean": "mean", "std": "std"}
        preprocessing = _preprocessing(
            {ours: config[theirs] for ours, theirs in fields.items() if config.get(theirs) is not None}
        )
        trained_at = tuple(config["input_size"][1:]) if "input_size" in config else None
        class_names = tuple(config["label_names"]) if config.get("label_names") else None
    return from_state_dict(
        read_state_dict(file),
        source,
        wanted,
        trained_at=trained_at,
        preprocessing=preprocessing,
        class_names=class_names,
    )


def from_converted(path: Path) -> Pretrained:
    """Returns the Pretrained of a directory that `save_converted` wrote."""
    with _json_explained(path / "config.json") as config:
        settings = model_settings("convit_tiny", **config["model"])  # the config has every setting
        preprocessing = _preprocessing(config["preprocessing"])
        class_names = tuple(config["class_names"]) if config["class_names"] else None
    return Pretrained(read_state_dict(path / "weights.safetensors"), settings, preprocessing, class_names, str(path))


def from_run(path: Path, which: str | int, ema: bool) -> Pretrained:
    """Returns the Pretrained of a run directory, with the architecture and preprocessing of its config."""
    from convit_jax.weights.run import read_run  # Orbax takes a second to import

    params = read_run(path, which, ema)
    with _json_explained(path / "config.json") as config, _json_explained(path / "run.json") as run:
        given = {name: value for name, value in config["model"].items() if value is not None}
        settings = model_settings(**{"num_classes": run["classes"], **given})
        preprocessing = _preprocessing({name: config["data"][name] for name in ("crop_ratio", "mean", "std")})
        class_names = tuple(run["class_names"])
    return Pretrained(names.to_state_dict(params), settings, preprocessing, class_names, str(path))


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes {name: array} as a .safetensors file, completely or not at all.

    Raises:
      UserError: safetensors has no such element type.
      OSError: the disk does not take it.
    """
    for name, tensor in tensors.items():
        if tensor.dtype.newbyteorder("=") not in SAFETENSORS.values():
            raise UserError(f"safetensors has no element type for {name} ({tensor.dtype}): convert it first.")
    # save_file takes the memory as it lies, so views must be copied.
    contiguous = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    with atomic_write(path, "wb") as file:
        save_file(contiguous, file.name, metadata={"format": "pt"})


def save_converted(loaded: Pretrained, directory: Path) -> None:
    """Writes a directory with weights.safetensors and config.json, completely or not at all.

    Raises:
      OSError: the disk does not take it; a directory that was there before is kept.
    """
    config = {
        "model": loaded.settings,
        "preprocessing": dataclasses.asdict(loaded.preprocessing),
        "class_names": loaded.class_names,
        "source": loaded.source,
    }
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as scratch:
        complete, before = Path(scratch) / "complete", Path(scratch) / "before"
        complete.mkdir()
        write_safetensors(complete / "weights.safetensors", loaded.tensors)
        (complete / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        try:
            if directory.exists():  # a directory cannot be renamed onto one that is not empty
                os.replace(directory, before)
            os.replace(complete, directory)
        except BaseException:
            if before.exists() and not directory.exists():
                os.replace(before, directory)
            raise


def _preprocessing(given: Mapping[str, Any]) -> Preprocessing:
    """A Preprocessing of what JSON gives."""
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return Preprocessing(**fields)


@contextlib.contextmanager
def _json_explained(path: Path) -> Iterator[dict[str, Any]]:
    """What a JSON file holds; errors inside that come from its contents become a UserError."""
    try:
        yield json.loads(path.read_text())
    except UserError:
        raise
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} is missing or damaged ({type(error).__name__}: {error}): "
            "make, convert or download the weights again."
        ) from error
