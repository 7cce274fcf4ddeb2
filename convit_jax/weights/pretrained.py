"""Trained weights from wherever they are, for a model, a training or a command.

A source is a file (.pth, .pt, .bin, .safetensors), a directory that `convert` wrote, one as the Hub
holds it, a run directory, a Hub id, or the authors' name of a model. On the way the head may be
replaced and the position embedding resized.
"""

import dataclasses
import hashlib
from pathlib import Path

import jax
import numpy as np

from convit_jax.errors import UserError, nearest
from convit_jax.models.layers import TRUNC_NORMAL
from convit_jax.models.variants import model_settings
from convit_jax.weights import hub, names
from convit_jax.weights.formats import from_converted, from_hub, from_run, from_tensors
from convit_jax.weights.positions import resize_pos_embed
from convit_jax.weights.reader import EMA_PLACES, open_state_dict
from convit_jax.weights.safetensors_file import pieces

BEHAVIOUR = ("dtype", "attention", "drop_rate", "attn_drop_rate", "drop_path_rate", "remat", "scan_unroll")
ARCHITECTURE = (
    "patch_size",
    "in_chans",
    "embed_dim",
    "depth",
    "num_heads",
    "mlp_ratio",
    "qkv_bias",
    "local_up_to_layer",
    "pos_embed_class_token",
    "distilled",
)


def load_pretrained(
    path, *, num_classes=None, image_size=None, num_heads=None, which="best", ema=False, seed=0, **behaviour
):
    """A trained model.

    Args:
      path: of a .pth, .pt or .safetensors file, of a converted directory or of a run directory; or a Hub id
        as "timm/convit_tiny.fb_in1k", or the authors' name as "convit_tiny".
      num_classes: replace the head by a new one with so many classes, initialised from `seed`.
      image_size: pixels, an int or (height, width): resize the position embedding for such images.
      num_heads: of a DeiT whose width is not in its table.
      which: "best" (by top-1 on the test split) or "latest" checkpoint of a run directory, or that of a
        step. ema: take its moving average.
      **behaviour: dtype, drop_path_rate, remat and the like, which change no weight.

    Returns:
      A VisionTransformer: model(images [B, H, W, 3], normalised) -> logits [B, num_classes].

    Raises:
      UserError: nothing usable there, or weights that do not fit; the sentence says what and why.
    """
    loaded = load(
        path,
        num_classes=num_classes,
        image_size=image_size,
        num_heads=num_heads,
        which=which,
        ema=ema,
        seed=seed,
    )
    return behaving(loaded, **behaviour).model()


def load(source, *, num_classes=None, image_size=None, num_heads=None, which="best", ema=False, seed=0):
    """The Pretrained of a source, every name and shape accounted for; arguments as of load_pretrained."""
    source, size = str(source), _pair(image_size)
    wanted = dict(num_heads=num_heads, num_classes=num_classes, image_size=size)
    path = fetch(source)
    if num_classes is not None and num_classes < 1:
        raise UserError(f"num_classes is {num_classes}: it must be at least 1.")

    if path.is_file():
        loaded = from_tensors(open_state_dict(path, EMA_PLACES if ema else None), source, wanted)
    elif (path / "checkpoints").is_dir():
        loaded = from_run(path, which, ema)
    elif ema:
        raise UserError(f"{source} holds no moving average: give a run directory, or leave ema out.")
    elif (path / "weights.safetensors").exists():
        loaded = from_converted(path)
    elif weight_files := [path / name for name in hub.WEIGHTS if (path / name).exists()]:
        loaded = from_hub(path, weight_files[0], source, wanted)
    else:
        raise UserError(
            f"{path} is neither a run directory (it has no checkpoints) nor a converted one (it has no "
            "weights.safetensors): give one of these, or a checkpoint file."
        )

    head = loaded.tensors.get("head.weight")
    if num_classes is not None and (head is None or len(head) != num_classes):
        loaded = _with_new_head(loaded, num_classes, seed)
    names.check(loaded.tensors, loaded.network[1], loaded.source)
    return loaded if size is None else _resized(loaded, size)


def fetch(source):
    """The path of a source; where there is none, of the Hub's copy, which is downloaded.

    Raises UserError if neither is there, or the Hub cannot be reached.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    repo = hub.repository(source)
    if repo is None:
        raise UserError(
            f"there is no file or directory {source}, and no published model of that name"
            f"{nearest(source, hub.PUBLISHED)} Published are: {', '.join(hub.PUBLISHED)}."
        )
    try:
        return hub.download(repo)
    except UserError as error:
        if repo != source:  # a published name, which is no path
            raise
        raise UserError(
            f"there is no file or directory {source}, and as a name on the Hub: {error}"
        ) from error


def behaving(loaded, **behaviour):
    """A Pretrained with other settings of those that change no weight, as dtype="bfloat16"."""
    for name in behaviour:
        if name not in BEHAVIOUR:
            raise UserError(
                f"weights that are loaded have no setting {name!r}{nearest(name, BEHAVIOUR)} "
                f"What may be given: {', '.join(BEHAVIOUR)}."
            )
    if behaviour.get("dtype") == "float32":  # which cuDNN's kernel does not take
        behaviour = {"attention": "xla", **behaviour}
    settings = model_settings("convit_tiny", **{**loaded.settings, **behaviour})  # every setting is given
    return dataclasses.replace(loaded, settings=settings)


def load_into(source, settings, seed, which="best"):
    """(parameters to start a training from, changes in words) of a source, for the settings of its model.

    The head is replaced if the number of classes differs, the position embedding resized if the size of
    images does. The parameters, a nested dict of float32 arrays, are read whole, so damage is found here.
    which: of a run directory's checkpoints, as of load_pretrained.

    Raises:
      UserError: nothing usable there, or a network of another architecture.
    """
    loaded = load(
        source,
        num_classes=settings["num_classes"],
        image_size=settings["image_size"],
        num_heads=None if settings["local_up_to_layer"] else settings["num_heads"],
        which=which,
        seed=seed,
    )
    differing = [name for name in ARCHITECTURE if loaded.settings[name] != settings[name]]
    if differing:
        theirs, ours = (
            ", ".join(f"{name}={s[name]}" for name in differing) for s in (loaded.settings, settings)
        )
        raise UserError(
            f"init_from {source} has {theirs}, but config.model asks for {ours}: set model.name, or these "
            "fields, to those of the weights."
        )
    return loaded.params(), loaded.changes


def match_classes(names, loaded):
    """Which of the weights' labels each class of the data has: (int32 [C], a sentence to say or None).

    Matched by name where the weights know all of the names. Else in order: as many classes as the weights
    have, which is said if they have other names; weights without names take fewer classes too, as their
    first labels.

    names: of the data's classes.

    Raises:
      UserError: more classes than the weights have, or fewer without names in common.
    """
    theirs = {name: label for label, name in enumerate(loaded.class_names or ())}
    if all(name in theirs for name in names):
        return np.array([theirs[name] for name in names], np.int32), None
    known = loaded.settings["num_classes"]
    if len(names) > known or (theirs and len(names) < known):
        raise UserError(
            f"the data has {len(names)} classes, as {names[0]!r}, and the weights have {known}: give weights "
            "and images of the same classes, or name the folders as the weights' classes."
        )
    sentence = None
    if theirs:
        sentence = (
            f"The data's classes ({names[0]!r}, ...) are not the weights' ({loaded.class_names[0]!r}, ...): "
            "matched in order."
        )
    return np.arange(len(names), dtype=np.int32), sentence


def _resized(loaded, size):
    """The same weights for images of another size (height, width) in pixels."""
    settings = loaded.settings
    if size == settings["image_size"]:
        return loaded
    patch = settings["patch_size"]
    if any(side < patch or side % patch for side in size):
        raise UserError(
            f"image_size {size[0]} x {size[1]} is not a multiple of the patches of {patch}: change it."
        )
    old, new = ([side // patch for side in sides] for sides in (settings["image_size"], size))
    pos_embed = resize_pos_embed(np.asarray(loaded.tensors["pos_embed"]), old, new)
    return dataclasses.replace(
        loaded,
        tensors={**loaded.tensors, "pos_embed": pos_embed},
        settings={**settings, "image_size": size},
        changes=(
            *loaded.changes,
            f"position embedding resized from {old[0]} x {old[1]} to {new[0]} x {new[1]} patches",
        ),
    )


def _with_new_head(loaded, num_classes, seed):
    """The same weights with a head, or both heads, initialised anew."""
    width, dtype = loaded.settings["embed_dim"], loaded.tensors["pos_embed"].dtype
    heads = {}
    for number, head in enumerate(("head", "head_dist") if loaded.settings["distilled"] else ("head",)):
        key = jax.random.fold_in(jax.random.key(seed), number)
        heads[f"{head}.weight"] = np.asarray(TRUNC_NORMAL(key, (num_classes, width))).astype(dtype)
        heads[f"{head}.bias"] = np.zeros(num_classes, dtype)
    return dataclasses.replace(
        loaded,
        tensors={**loaded.tensors, **heads},
        settings={**loaded.settings, "num_classes": num_classes},
        class_names=None,
        changes=(*loaded.changes, f"new head for {num_classes} classes"),
    )


def fingerprint(tensors):
    """SHA-256 of the names, dtypes, shapes and values of a nested dict of arrays, or of Stored ones."""
    digest = hashlib.sha256()
    for path, tensor in jax.tree_util.tree_leaves_with_path(tensors):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        for piece in pieces(tensor):
            digest.update(piece)
    return digest.hexdigest()


def describe(loaded):
    """One line: what the weights are."""
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


def _pair(image_size):
    """(height, width) of an int, a pair or None."""
    return (image_size, image_size) if isinstance(image_size, int) else image_size and tuple(image_size)
