"""Loads trained weights from any source (see `load_pretrained`), for a model, a training or a command."""

import dataclasses
import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convit_jax.config import is_run
from convit_jax.data.class_names import IMAGENET, words
from convit_jax.errors import UserError, nearest
from convit_jax.models.initializers import trunc_normal
from convit_jax.models.variants import SIZES, model_settings, parse_image_size
from convit_jax.models.vit import VisionTransformer, patch_grid
from convit_jax.rundir import disk_errors
from convit_jax.weights.architecture import infer
from convit_jax.weights.checkpoint_file import read_state_dict
from convit_jax.weights.formats import Pretrained, check_target, checked_json, from_run, from_state_dict, save_converted
from convit_jax.weights.hub import WEIGHTS, fetch
from convit_jax.weights.names import check_state_dict, to_state_dict
from convit_jax.weights.positions import resize_pos_embed
from convit_jax.weights.preprocess import Preprocess, Preprocessing, usual_crop_ratio

BEHAVIOUR = ("dtype", "attention", "drop_rate", "attn_drop_rate", "drop_path_rate", "remat", "scan_unroll")
NO_MATTER = (*BEHAVIOUR, "conv_init", "locality_strength", "gate_init")  # to trained weights
FILES = ("weights.safetensors", *WEIGHTS, "model.safetensors.index.json", "pytorch_model.bin.index.json")
Size = int | str | Sequence[int] | None  # see models.variants.parse_image_size


def load_pretrained(
    path: str | os.PathLike[str],
    *,
    num_classes: int | None = None,
    image_size: Size = None,
    num_heads: int | None = None,
    which: str | int = "best",
    ema: bool = False,
    seed: int = 0,
    **behaviour: Any,
) -> VisionTransformer:
    """Returns a trained model: model(images [B, H, W, 3], normalised) -> logits [B, num_classes].

    `model.preprocess(images)` makes the input from paths, Pillow images or uint8 arrays, and `model.class_names`
    has the classes in words, or None. The model is in evaluation mode, and its drop rates are 0 unless given.

    Args:
      path: of a .pth, .pt, .bin or .safetensors file, a converted directory or a run directory; or a Hub
        id as "timm/convit_tiny.fb_in1k", or the authors' name as "convit_tiny".
      num_classes: replace the head by a new one of this size, initialised from `seed`; 0 removes it.
      image_size: pixels, a side, (height, width) or "224x448": resize the position embedding for such images.
      num_heads: of a DeiT whose width is not in the table of sizes.
      which: checkpoint of a run directory: "best" (by top-1 on the test split), "latest", or a step.
      ema: take the moving average of the weights in a run or a training checkpoint.
      seed: of the new head.
      **behaviour: settings that change no weight, as dtype or drop_path_rate.

    Raises:
      UserError: the source cannot be used, or its weights do not fit; the message says what and why.
    """
    loaded = load(
        path, num_classes=num_classes, image_size=image_size, num_heads=num_heads, which=which, ema=ema, seed=seed
    )
    rates = {"drop_rate": 0.0, "attn_drop_rate": 0.0, "drop_path_rate": 0.0}
    loaded = with_behaviour(loaded, **{**rates, **behaviour})
    facts = [f"Loaded {loaded.source}", *loaded.changes, f"computed in {loaded.settings['dtype']}"]
    print(", ".join(facts), file=sys.stderr)
    return loaded.model()


def save_pretrained(
    model: VisionTransformer,
    path: str | os.PathLike[str],
    *,
    class_names: Sequence[str] | None = None,
    **preprocessing: Any,
) -> None:
    """Writes a model to a file or directory that `load_pretrained`, all commands, PyTorch and timm read.

    Args:
      model: its weights, sizes and dtype are saved; all other settings, as drop rates, return to their defaults.
      path: with the ending .safetensors a file, otherwise a directory; converted weights that are there are replaced.
      class_names: of each label; model.class_names by default.
      **preprocessing: crop_ratio, interpolation, and mean and std of pixels in 0..1; what is not given is that of
        model.preprocess or, without one, of the recipe: 0.875 (1 up to 32 px), "bicubic", ImageNet's.

    Raises:
      UserError: the path is of another kind or cannot be written, the names are not one per class, or the model has
        other parameters than a VisionTransformer.
    """
    target = Path(path).expanduser()
    check_target(target)
    names = tuple(map(str, (model.class_names or ()) if class_names is None else class_names))
    if names and len(names) != model.num_classes:
        raise UserError(f"{len(names)} class_names for a model of {model.num_classes} classes: give one for each.")
    if names == tuple(IMAGENET.values()):  # the words of load_pretrained
        names = tuple(IMAGENET)
    tensors = to_state_dict(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    heads = model.sa_blocks.attn.num_heads
    settings = infer(tensors, "the model", trained_size=model.image_size, num_heads=heads) | {"dtype": model.dtype.name}
    recipe = Preprocessing(crop_ratio=usual_crop_ratio(model.image_size))
    how = model.preprocess.how if isinstance(model.preprocess, Preprocess) else recipe
    how = dataclasses.replace(how, **preprocessing)
    saved = Pretrained(tensors, settings, how, names or None, "save_pretrained")
    check_state_dict(tensors, saved.network[1], "the model")
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        save_converted(saved, target)


def load(
    source: str | os.PathLike[str],
    *,
    num_classes: int | None = None,
    image_size: Size = None,
    num_heads: int | None = None,
    which: str | int = "best",
    ema: bool = False,
    seed: int = 0,
) -> Pretrained:
    """Returns the Pretrained of a source, with every name and shape checked; see load_pretrained."""
    source = str(source)
    path = fetch(source)
    size = None if image_size is None else parse_image_size(image_size)
    if is_run(path):
        loaded = from_run(path, which, ema)
    elif files := [path] if path.is_file() else [path / name for name in FILES if (path / name).exists()]:
        tensors = _read_shards(files[0], ema)
        loaded = from_state_dict(tensors, files[0], path / "config.json", source, size, num_heads)
    else:
        raise UserError(
            f"{path} is neither a run directory (it has no checkpoints) nor a converted one (it has no "
            "weights.safetensors): give one of these, or a checkpoint file (from a distributed checkpoint of PyTorch "
            "torch.distributed.checkpoint.format_utils.dcp_to_torch_save makes one)."
        )
    check_state_dict(loaded.tensors, loaded.network[1], source)
    if num_classes not in (None, loaded.settings["num_classes"]):
        loaded = _with_new_head(loaded, num_classes, seed)
    return loaded if size in (None, loaded.settings["image_size"]) else _resized(loaded, size)


def _read_shards(path: Path, ema: bool) -> dict[str, np.ndarray]:
    """The state dict in a file, or in the files that an index names."""
    if path.suffix != ".json":
        return read_state_dict(path, ema=ema)
    with checked_json(path) as index:
        files = sorted({Path(name).name for name in index["weight_map"].values()})
    return {name: array for file in files for name, array in read_state_dict(path.parent / file, ema=ema).items()}


def with_behaviour(loaded: Pretrained, **behaviour: Any) -> Pretrained:
    """Returns the same weights with other settings that change no weight, as dtype="bfloat16"."""
    for name in behaviour:
        if name not in BEHAVIOUR:
            raise UserError(
                f"loaded weights have no setting {name!r}{nearest(name, BEHAVIOUR)} "
                f"The settings are: {', '.join(BEHAVIOUR)}."
            )
    if behaviour.get("dtype") in ("float32", jnp.float32):  # cuDNN's kernel does not take it
        behaviour = {"attention": "xla", **behaviour}
    return loaded.with_settings(**behaviour)


def load_into(source: str, settings: Mapping[str, Any], seed: int) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Returns (parameters, source and changes for people) of weights from which a training of these settings starts.

    Another number of classes gets a new head, initialised from `seed`, and another image size a resized position
    embedding. Other differences raise UserError.
    """
    loaded = load(
        source,
        num_classes=settings["num_classes"],
        image_size=settings["image_size"],
        num_heads=None if settings["local_up_to_layer"] else settings["num_heads"],
        seed=seed,
    )
    differing = [name for name in loaded.settings if name not in NO_MATTER and loaded.settings[name] != settings[name]]
    if differing:
        theirs, ours = (", ".join(f"{name}={s[name]}" for name in differing) for s in (loaded.settings, settings))
        raise UserError(
            f"init_from {source} has {theirs}, but config.model asks for {ours}: "
            "set model.name, or these fields, to those of the weights."
        )
    return loaded.params(), (loaded.source, *loaded.changes)


def as_arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns arguments of create_model for a network: a name, and the settings in which the network differs."""
    family = "convit" if settings["local_up_to_layer"] else "deit"
    sizes = {size: name for name, size in SIZES.items() if name.startswith(family)}
    name = sizes.get((settings["embed_dim"], settings["num_heads"]), f"{family}_tiny")
    own = model_settings(name, num_classes=settings["num_classes"])
    return {"name": name} | {key: settings[key] for key in own if key not in NO_MATTER and settings[key] != own[key]}


def match_classes(names: Sequence[str], loaded: Pretrained) -> tuple[np.ndarray, str | None]:
    """Returns (the weights' label of each class of some data, int32 [C]; a message or None).

    Classes match by name or its words if the weights know all, otherwise by order if there are as many. Weights without
    names take fewer classes, as their first labels.
    """
    theirs: dict[str, int] = {}
    for named in (words, str):  # names as they are count more
        theirs |= {named(name): label for label, name in enumerate(loaded.class_names or ())}
    found = [theirs.get(name, theirs.get(words(name), -1)) for name in names]
    if min(found) >= 0 and len({*found}) == len(found):  # "crane" is two classes of ImageNet
        return np.array(found, np.int32), None
    known = loaded.settings["num_classes"]
    if len(names) > known or (theirs and len(names) < known):
        raise UserError(
            f"the data has {len(names)} classes, as {names[0]!r}, and the weights have {known}: give weights "
            "and images of the same classes, or name the folders as the weights' classes."
        )
    message = None
    if loaded.class_names:
        message = (
            f"The data's classes ({names[0]!r}, ...) are not the weights' ({loaded.class_names[0]!r}, ...): "
            "matched in order."
        )
    return np.arange(len(names), dtype=np.int32), message


def fingerprint(tensors: Any) -> str:
    """Returns the SHA-256 of the names, dtypes, shapes and values in a nested dict of arrays."""
    digest = hashlib.sha256()
    for path, tensor in jax.tree_util.tree_leaves_with_path(tensors):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        digest.update(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def describe_weights(loaded: Pretrained) -> str:
    """Returns a line that says what the weights are."""
    s = loaded.settings
    count = sum(tensor.size for tensor in loaded.tensors.values())
    dtypes = ", ".join(sorted({str(tensor.dtype) for tensor in loaded.tensors.values()}))
    kind = ("ConViT" if s["local_up_to_layer"] else "DeiT") + (", distilled" if s["distilled"] else "")
    height, width = s["image_size"]
    return (
        f"{kind}: {count:,} parameters ({dtypes}), {s['depth']} blocks, {s['local_up_to_layer']} of them "
        f"GPSA, {s['num_heads']} heads, width {s['embed_dim']}, {height} x {width} px in patches of "
        f"{s['patch_size']}, {s['num_classes']} classes"
    )


def _resized(loaded: Pretrained, size: tuple[int, int]) -> Pretrained:
    """The same weights for images of another size (height, width) in pixels."""
    resized = loaded.with_settings(image_size=size)
    old, new = patch_grid(loaded.settings), patch_grid(resized.settings)
    tensors = {**loaded.tensors, "pos_embed": resize_pos_embed(loaded.tensors["pos_embed"], old, new)}
    change = f"position embedding resized from {old[0]} x {old[1]} to {new[0]} x {new[1]} patches"
    return dataclasses.replace(resized, tensors=tensors, changes=(*loaded.changes, change))


def _with_new_head(loaded: Pretrained, num_classes: int, seed: int) -> Pretrained:
    """The same weights with a new head, or two if distilled."""
    resized, dtype = loaded.with_settings(num_classes=num_classes), loaded.tensors["pos_embed"].dtype
    tensors = {name: tensor for name, tensor in loaded.tensors.items() if not name.startswith("head")}
    heads = ("head", "head_dist") if loaded.settings["distilled"] else ("head",)
    for number, head in enumerate(heads if num_classes else ()):
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), number)
        values = trunc_normal(key, (num_classes, loaded.settings["embed_dim"]))
        tensors |= {f"{head}.weight": np.asarray(values).astype(dtype), f"{head}.bias": np.zeros(num_classes, dtype)}
    change = f"new head for {num_classes} classes" if num_classes else "head removed"
    return dataclasses.replace(resized, tensors=tensors, class_names=None, changes=(*loaded.changes, change))
