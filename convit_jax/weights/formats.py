"""Weights with their settings, as read from files and run directories and written to files.

Tensors keep the original's names and the file's dtype until a model takes them, so that exporting gives
back the same tensors.
"""

import contextlib
import dataclasses
import functools
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from convit_jax.data.class_names import IMAGENET, words
from convit_jax.errors import UserError, explained
from convit_jax.models.variants import abstract_model, model_settings, parse_image_size, settings_of
from convit_jax.models.vit import VisionTransformer
from convit_jax.rundir import atomic_write, write_json
from convit_jax.weights import names
from convit_jax.weights.architecture import infer
from convit_jax.weights.preprocess import Preprocess, Preprocessing, usual_crop_ratio

TIMM = {"crop_ratio": "crop_pct", "interpolation": "interpolation", "mean": "mean", "std": "std"}  # its names

METADATA = "convit_jax"  # key of the config in a .safetensors file
FILES = {"weights.safetensors", "model.safetensors", "config.json", "README.md"}  # that a conversion writes
OTHERS = (".pth", ".pt", ".bin", ".ckpt", ".h5", ".npz", ".onnx", ".pkl", ".tar")  # rather mistakes than directories
CARD = """\
---
library_name: timm
tags: [image-classification, timm]
---
# {kind}, {num_classes} classes

A {kind} with {depth} blocks ({local_up_to_layer} of them GPSA), {num_heads} heads and width {embed_dim}, for images
of {height} x {width} pixels, converted by convit_jax.

```python
import timm

model = timm.create_model("local-dir:DIRECTORY", pretrained=True).eval()  # or "hf-hub:USER/NAME"
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```
"""


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Weights with what belongs to them."""

    tensors: Mapping[str, np.ndarray]  # with the original's names and layouts, and the file's dtypes
    settings: dict[str, Any]  # arguments of VisionTransformer, as of model_settings()
    preprocessing: Preprocessing  # of the images that the network was trained for
    class_names: tuple[str, ...] | None  # of each label (ImageNet: WordNet ids)
    source: str  # where the weights are from
    changes: tuple[str, ...] = ()  # what was done to the weights since, for people

    @functools.cached_property
    def network(self) -> tuple[nnx.GraphDef, dict[str, Any]]:
        """The (graphdef, shapes of the parameters) that models.variants.abstract_model gives."""
        return abstract_model(self.settings)

    def params(self) -> dict[str, Any]:
        """Returns the network's parameters, a nested dict of float32 numpy arrays."""
        return names.to_params(self.tensors, self.network[1])

    def model(self) -> VisionTransformer:
        """Returns the model, with its preprocessing and, if known, the names of its classes in words."""
        model = nnx.merge(self.network[0], names.to_params(self.tensors, self.network[1], jax.device_put))
        model.preprocess = Preprocess(self.preprocessing, self.settings["image_size"])
        model.class_names = self.class_names and tuple(words(name) for name in self.class_names)
        return model

    def with_settings(self, **changes: Any) -> "Pretrained":
        """Returns the same weights with some settings changed and checked."""
        settings = model_settings("convit_tiny", **{**self.settings, **changes})  # every setting is given
        return dataclasses.replace(self, settings=settings)

    def class_name(self, label: int) -> str:
        """Returns the name of a class, "class 7" if it has none."""
        names = self.class_names or ()
        return names[label] if label < len(names) else f"class {label}"


def from_state_dict(
    tensors: Mapping[str, np.ndarray],
    file: Path,
    config_file: Path,
    source: str,
    image_size: Any,
    num_heads: int | None,
) -> Pretrained:
    """Returns the Pretrained of a state dict, with the config.json of its folder, ours or timm's, or that in its file.

    What timm's lacks is as in the recipe, and 1,000 classes are ImageNet's.
    """
    with checked_json(config_file if config_file.exists() else file) as config:
        if "model" in config:  # ours has every setting
            settings, how = model_settings("convit_tiny", **config["model"]), Preprocessing(**config["preprocessing"])
            return Pretrained(tensors, settings, how, tuple(config["class_names"] or ()) or None, source)
        config |= (config.get("pretrained_cfg") or {}) | (config.get("model_args") or {})
        if (pool := config.get("global_pool") or "token") != "token":
            raise UserError(f"global_pool is {pool!r}, but heads here read the class token: train with 'token'.")
        given = {ours: config[theirs] for ours, theirs in TIMM.items() if config.get(theirs) is not None}
        how, class_names = Preprocessing(**given), config.get("label_names") or ()
        size = config.get("img_size") or config.get("input_size", [])[1:]
        trained_size, num_heads = parse_image_size(size) if size else None, num_heads or config.get("num_heads")
    settings = infer(tensors, source, trained_size=trained_size, image_size=image_size, num_heads=num_heads)
    if isinstance(class_names, dict):  # {"0": "cat", "2": "dog"}
        class_names = [class_names.get(str(label), f"class {label}") for label in range(settings["num_classes"])]
    if "crop_ratio" not in given:
        how = dataclasses.replace(how, crop_ratio=usual_crop_ratio(settings["image_size"]))
    if settings["num_classes"] == len(IMAGENET):
        class_names = class_names or IMAGENET
    return Pretrained(tensors, settings, how, tuple(class_names) or None, source)


def from_run(path: Path, which: str | int, ema: bool) -> Pretrained:
    """Reads a run directory, with the architecture and preprocessing of its config."""
    from convit_jax.weights.run import find_step, read_run  # Orbax takes a second to import

    step = which if isinstance(which, int) else find_step(path, which, ema)
    tensors = names.to_state_dict(read_run(path, step, ema))
    kind = "checkpoint" if which == step else f"{which} checkpoint"
    source = f"{path} ({kind}, step {step}{', moving average' if ema else ''})"
    with checked_json(path / "run.json") as run:
        class_names = tuple(run["class_names"])
        known = {"num_classes": run["classes"], "dtype": run.get("dtype", "float32")}
    with checked_json(path / "config.json") as config:
        settings = settings_of(config["model"], **known)
        how = Preprocessing.of_config(config["data"])
        return Pretrained(tensors, settings, how, class_names, source)


@contextlib.contextmanager
def checked_json(path: Path) -> Iterator[dict[str, Any]]:
    """The config in a JSON or .safetensors file, {} without one; errors inside from its contents are UserErrors."""
    with explained(path):
        text = "{}"
        if path.suffix == ".json":
            text = path.read_text()
        else:
            with contextlib.suppress(SafetensorError), safe_open(path, "np") as header:  # PyTorch's files have none
                text = (header.metadata() or {}).get(METADATA, text)
        yield json.loads(text)


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any] | None = None) -> None:
    """Writes {name: array} and a config as a .safetensors file, completely or not at all. Raises OSError."""
    # `save` takes the memory as it lies, so views must be copied. `save_file` would hide the file from other users.
    contiguous = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    with atomic_write(path, "wb") as file:
        file.write(save(contiguous, metadata={"format": "pt"} | ({METADATA: json.dumps(config)} if config else {})))


def check_target(target: Path) -> None:
    """Raises UserError if weights cannot be written to this path, or would replace anything but converted weights."""
    if target.suffix in OTHERS:
        raise UserError(
            f"{target} is of a kind that is not written: give a directory or {target.with_suffix('.safetensors')}, "
            "which PyTorch and timm load too (docs/checkpoints.md has the line that makes a .pth of it)."
        )
    found = [*target.iterdir()] if target.is_dir() else [target] if target.exists() else []
    known = not target.is_dir() or {path.name for path in found} <= FILES
    if found and not (known and any(path.suffix == ".safetensors" for path in found)):
        raise UserError(f"{target} holds other things than converted weights: give another path.")


def save_converted(loaded: Pretrained, target: Path) -> None:
    """Writes a .safetensors file, or a directory of that and config.json; a failed write replaces none. OSError."""
    if target.suffix == ".safetensors":
        write_safetensors(target, loaded.tensors, _config(loaded))
    else:
        _write_directory(target, "weights.safetensors", loaded, _config(loaded))


def save_for_timm(loaded: Pretrained, directory: Path) -> None:
    """Writes a directory for `timm.create_model("local-dir:DIRECTORY", pretrained=True)` and for the Hub.

    It has model.safetensors, config.json and a model card. Raises UserError for a network that timm lacks, OSError.
    """
    s, how, (height, width) = loaded.settings, loaded.preprocessing, loaded.settings["image_size"]
    given = ("in_chans", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias")
    arguments = {name: s[name] for name in given} | {"img_size": [height, width]}
    if s["local_up_to_layer"]:
        kind, architecture, arguments["local_up_to_layer"] = "ConViT", "convit_tiny", s["local_up_to_layer"]
        arguments["embed_dim"] //= s["num_heads"]  # timm's width is per head
        timm_has_it = height == width and not s["distilled"] and not s["pos_embed_class_token"]
    else:
        kind, timm_has_it = "DeiT", s["pos_embed_class_token"]
        architecture = "deit_tiny_distilled_patch16_224" if s["distilled"] else "deit_tiny_patch16_224"
    if not timm_has_it:
        raise UserError(
            "timm has no such network (a ConViT without GPSA blocks, with a distillation token, a position of the "
            "class token, or oblong images): leave --for=timm out."
        )
    config = {
        "architecture": architecture,
        "num_classes": s["num_classes"],
        "num_features": s["embed_dim"],
        "model_args": arguments,
        "pretrained_cfg": {theirs: getattr(how, ours) for ours, theirs in TIMM.items()}
        | {"input_size": [s["in_chans"], height, width], "num_classes": s["num_classes"], "fixed_input_size": True}
        | {"first_conv": "patch_embed.proj", "classifier": ["head", "head_dist"] if s["distilled"] else "head"},
        "label_names": loaded.class_names,
    }
    card = CARD.format(kind=kind, height=height, width=width, **s)
    _write_directory(directory, "model.safetensors", loaded, config, card)


def _config(loaded: Pretrained) -> dict[str, Any]:
    """All but the tensors."""
    return {
        "model": loaded.settings,
        "preprocessing": dataclasses.asdict(loaded.preprocessing),
        "class_names": loaded.class_names,
        "source": loaded.source,
    }


def _write_directory(directory: Path, weights: str, loaded: Pretrained, config: dict[str, Any], card: str = "") -> None:
    """Writes a directory of weights, config.json and a card in place of an old one, which a failure leaves as it was.

    A kill while the two change places leaves the old one next to it, as .NAME.*/old.
    """
    directory = directory.resolve()
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as scratch:
        new, old = Path(scratch, "new"), Path(scratch, "old")
        new.mkdir()
        write_safetensors(new / weights, loaded.tensors, _config(loaded))
        write_json(new / "config.json", config)
        model_card = directory / "README.md"
        if card:
            with atomic_write(new / "README.md") as file:
                file.write(card)
        elif model_card.is_file() and b"converted by convit_jax" not in model_card.read_bytes():  # the user's own
            shutil.copy2(model_card, new)
        try:
            if directory.exists():
                directory.rename(old)
            new.rename(directory)
        except BaseException:
            if old.exists() and not directory.exists():
                old.rename(directory)
            raise
