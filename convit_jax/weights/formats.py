"""Where weights lie, and what comes with them from there: a file, a converted directory, one as the Hub
holds it, a run directory.

Whatever it is, tensors keep the original's names and the file's dtype until a model takes them, so that
the way back gives the same tensors.
"""

import contextlib
import dataclasses
import functools
import json
import os
import tempfile
from pathlib import Path

import jax
from flax import nnx

from convit_jax.data.class_names import IMAGENET
from convit_jax.errors import UserError
from convit_jax.models.variants import abstract_model, model_settings
from convit_jax.weights import names, safetensors_file
from convit_jax.weights.architecture import infer
from convit_jax.weights.reader import open_state_dict

INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")  # Pillow's


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How an image becomes an input: resize, cut out the centre, (x - mean) / std.

    crop_ratio: of the crop's side to the resized image's short side. interpolation: of the resizing.
    mean, std: per channel, of pixels in 0..1.
    """

    crop_ratio: float = 0.875
    interpolation: str = "bicubic"
    mean: tuple = (0.485, 0.456, 0.406)
    std: tuple = (0.229, 0.224, 0.225)

    def words(self):
        """For people."""
        mean, std = (", ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return f"crop {self.crop_ratio:g}, {self.interpolation}, mean {mean}, std {std}"

    def __post_init__(self):
        if self.interpolation not in INTERPOLATIONS:
            raise UserError(
                f"the weights ask for interpolation {self.interpolation!r}: "
                f"convert them anew with one of {', '.join(INTERPOLATIONS)} in their config.json."
            )


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Weights with what belongs to them.

    tensors: {name: numpy array, or Stored while it lies in its file} with the original's names, layouts
    and the file's dtypes. settings: of VisionTransformer. class_names: folders of the classes (ImageNet:
    WordNet ids), or None. source: where it is from. changes: what was done to the weights since, in words.
    """

    tensors: dict
    settings: dict
    preprocessing: Preprocessing
    class_names: tuple | None
    source: str
    changes: tuple = ()

    @functools.cached_property
    def network(self):
        """(graphdef, shapes of the parameters), as models.variants.abstract_model gives them."""
        return abstract_model(self.settings)

    def params(self):
        """Parameters for the network, a nested dict of float32 numpy arrays."""
        return names.to_params(self.tensors, self.network[1])

    def model(self):
        """The model, a VisionTransformer."""
        return nnx.merge(self.network[0], jax.device_put(self.params()))

    def class_name(self, label):
        """The name of a class, "class 7" if it has none."""
        names = self.class_names or ()
        return names[label] if label < len(names) else f"class {label}"


def from_tensors(tensors, source, wanted, *, trained_at=None, preprocessing=None, class_names=None):
    """The Pretrained of a state dict: architecture by names and shapes, preprocessing of the recipe.

    wanted: num_heads, num_classes and image_size as the caller gave them, for pytorch.architecture.infer.
    """
    settings = infer(tensors, source, trained_at=trained_at, **wanted)
    if preprocessing is None:  # the authors do not resize images of 32 pixels or less
        preprocessing = Preprocessing(crop_ratio=0.875 if max(settings["image_size"]) > 32 else 1.0)
    if class_names is None and settings["num_classes"] == len(IMAGENET):
        class_names = tuple(IMAGENET)
    return Pretrained(tensors, settings, preprocessing, class_names, source)


def from_hub(path, file, source, wanted):
    """The Pretrained of a directory with timm's config.json; file: of the weights in it."""
    with _understood(path / "config.json") as config_file:
        config = json.loads(config_file.read_text())
        config = {**config, **config.get("pretrained_cfg", {})}
        given = {"crop_ratio": "crop_pct", "interpolation": "interpolation", "mean": "mean", "std": "std"}
        preprocessing = _preprocessing(
            {ours: config[theirs] for ours, theirs in given.items() if config.get(theirs) is not None}
        )
        trained_at = tuple(config["input_size"][1:]) if "input_size" in config else None
        class_names = tuple(config["label_names"]) if config.get("label_names") else None
    return from_tensors(
        open_state_dict(file),
        source,
        wanted,
        trained_at=trained_at,
        preprocessing=preprocessing,
        class_names=class_names,
    )


def from_converted(path):
    """The Pretrained of a directory that `save` wrote."""
    with _understood(path / "config.json") as config_file:
        config = json.loads(config_file.read_text())
        settings = model_settings("convit_tiny", **config["model"])  # every setting is given
        preprocessing = _preprocessing(config["preprocessing"])
        class_names = tuple(config["class_names"]) if config["class_names"] else None
    tensors = open_state_dict(path / "weights.safetensors")
    return Pretrained(tensors, settings, preprocessing, class_names, str(path))


def from_run(path, which, ema):
    """The Pretrained of a run directory: architecture and preprocessing of its config."""
    from convit_jax.weights.run import read_run  # Orbax takes a second, and files do without it

    params = read_run(path, which, ema)
    with _understood(path / "config.json") as config_file, _understood(path / "run.json") as run_file:
        config, run = json.loads(config_file.read_text()), json.loads(run_file.read_text())
        given = {name: value for name, value in config["model"].items() if value is not None}
        settings = model_settings(**{"num_classes": run["classes"], **given})
        preprocessing = _preprocessing({name: config["data"][name] for name in ("crop_ratio", "mean", "std")})
        class_names = tuple(run["class_names"])
    return Pretrained(names.to_state_dict(params), settings, preprocessing, class_names, str(path))


def save(loaded, directory):
    """Write a Pretrained as a directory with weights.safetensors and config.json, whole or not at all."""
    directory = Path(directory)
    config = {
        "model": loaded.settings,
        "preprocessing": dataclasses.asdict(loaded.preprocessing),
        "class_names": loaded.class_names,
        "source": loaded.source,
    }
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as scratch:
        whole = Path(scratch) / "whole"
        whole.mkdir()
        with open(whole / "weights.safetensors", "wb") as file:
            safetensors_file.write(file, loaded.tensors)
            file.flush()
            os.fsync(file.fileno())
        (whole / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        before = Path(scratch) / "before"
        try:
            if directory.exists():
                os.replace(directory, before)
            os.replace(whole, directory)
        except BaseException:
            if before.exists() and not directory.exists():
                os.replace(before, directory)
            raise


def _preprocessing(given):
    """A Preprocessing of what JSON gives."""
    return Preprocessing(
        **{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    )


@contextlib.contextmanager
def _understood(path):
    """The path of a JSON file; what turns out to be wrong with it inside is said in a sentence."""
    try:
        yield path
    except UserError:
        raise
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} is not as it should be ({type(error).__name__}: {error}): make, convert or download the "
            "weights again."
        ) from error
