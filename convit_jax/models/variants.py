"""The twelve models of the paper's Table 1, and `create_model`.

Each head has 48 channels (ConViT) or 64 (DeiT and the "plus" models). The rest is common: 12 blocks, patches
of 16 x 16 pixels, MLP ratio 4. The first ten blocks of ConViT are GPSA.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convit_jax.errors import UserError, nearest
from convit_jax.models.vit import Settings, VisionTransformer, patch_grid

#        name            embed_dim, num_heads
SIZES = {
    "convit_tiny": (192, 4),
    "convit_tiny_plus": (256, 4),
    "convit_small": (432, 9),
    "convit_small_plus": (576, 9),
    "convit_base": (768, 16),
    "convit_base_plus": (1024, 16),
    "deit_tiny": (192, 3),
    "deit_tiny_plus": (256, 4),
    "deit_small": (384, 6),
    "deit_small_plus": (576, 9),
    "deit_base": (768, 12),
    "deit_base_plus": (1024, 16),
}
COMMON: Settings = dict(
    patch_size=16,
    in_chans=3,
    depth=12,
    mlp_ratio=4.0,
    distilled=False,
    conv_init=True,
    locality_strength=1.0,
    gate_init=1.0,
    attention="xla",
    drop_rate=0.0,
    attn_drop_rate=0.0,
    drop_path_rate=0.0,
    dtype="float32",
    remat=False,
    scan_unroll=1,
)
FAMILIES: dict[str, Settings] = {
    "convit": dict(qkv_bias=False, local_up_to_layer=10, pos_embed_class_token=False),
    "deit": dict(qkv_bias=True, local_up_to_layer=0, pos_embed_class_token=True),
}
TIMM_SETTINGS = {  # what its users try -> the remedy
    "img_size": ": use image_size.",
    "pretrained": ": use convit_jax.load_pretrained(name).",
    "checkpoint_path": ": use convit_jax.load_pretrained(path).",
    "proj_drop_rate": ": use drop_rate.",
}
TIMM_NAME = re.compile(
    r"(?P<model>convit_[a-z]+|deit_[a-z]+?)(?P<distilled>_distilled)?(_patch16_(?P<side>\d+))?(\.\w+)?"
)
OVERRIDES = ("embed_dim", "num_heads", *COMMON, *FAMILIES["convit"])


def list_models() -> list[str]:
    """Returns the names of all models of Table 1: ConViT, then DeiT, by size."""
    return list(SIZES)


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    image_size: int | str | Sequence[int] | None = None,
    seed: int = 0,
    **overrides: Any,
) -> VisionTransformer:
    """Returns a model with random weights, in evaluation mode.

    Args:
      name: one of list_models(), or timm's name of such a model, as "deit_base_distilled_patch16_384".
      num_classes: number of classes; 0 for a model without a head, which returns features.
      image_size: pixels, a side, (height, width) or "224x448"; by default 224, or what timm's name says.
      seed: of the weights, 0 to 2^32 - 1; the same seed gives the same weights.
      **overrides: other settings of VisionTransformer, such as embed_dim=64 or dtype=jnp.bfloat16.

    Returns:
      A flax.nnx.Module: model(images float32 [B, H, W, 3], normalised) -> logits float32 [B, num_classes].

    Raises:
      UserError: an unknown name or setting, or values that do not fit together.
    """
    settings = model_settings(name, num_classes=num_classes, image_size=image_size, **overrides)
    return new_model(settings, seed)


def model_settings(
    name: str, *, num_classes: int = 1000, image_size: int | str | Sequence[int] | None = None, **overrides: Any
) -> Settings:
    """Returns all settings of a model, checked. Arguments and errors as for `create_model`."""
    if timm := TIMM_NAME.fullmatch(name):
        name, image_size = timm["model"], image_size or int(timm["side"] or 224)
        overrides = {"distilled": True, **overrides} if timm["distilled"] else overrides
    if name not in SIZES:
        raise UserError(f"there is no model {name!r}{nearest(name, SIZES)} The models are: {', '.join(SIZES)}.")
    for override in overrides:
        if override not in OVERRIDES:
            hint = TIMM_SETTINGS.get(override, nearest(override, OVERRIDES))
            raise UserError(
                f"a model has no setting {override!r}{hint} The settings are: {', '.join(sorted(OVERRIDES))}."
            )
    embed_dim, num_heads = SIZES[name]
    settings = dict(COMMON, embed_dim=embed_dim, num_heads=num_heads, **FAMILIES[name.split("_")[0]])
    settings.update(overrides, num_classes=num_classes)
    settings["image_size"] = parse_image_size(224 if image_size is None else image_size)
    if not isinstance(settings["dtype"], str):
        settings["dtype"] = jnp.dtype(settings["dtype"]).name
    _check_settings(settings)
    return settings


def settings_of(section: Mapping[str, Any], **known: Any) -> Settings:
    """Returns model_settings() of a config's section `model`; `known`: of fields that it may leave open."""
    given = {name: value for name, value in section.items() if value not in (None, "auto")}
    return model_settings(**{**known, **given})


def parse_image_size(size: int | str | Sequence[int]) -> tuple[int, int]:
    """Returns (height, width) of 384, "384", "224x448" or (224, 448). Raises UserError for anything else."""
    sides: list[Any] = [size]
    if isinstance(size, str):
        sides = size.split("x")
    elif isinstance(size, Sequence):
        sides = [*size]
    if len(sides) in (1, 2) and all(str(side).isdigit() for side in sides):
        return int(sides[0]), int(sides[-1])
    raise UserError(f"image_size is {size!r}: give a side, as 384, or HEIGHTxWIDTH, as 224x448.")


def _check_settings(s: Settings) -> None:
    for name in ("patch_size", "in_chans", "num_classes", "embed_dim", "num_heads", "depth", "scan_unroll"):
        least = 0 if name == "num_classes" else 1
        if not isinstance(s[name], int | np.integer) or s[name] < least:
            raise UserError(f"{name} is {s[name]!r}: it must be at least {least} and a whole number.")
    height, width = s["image_size"]
    if height < 1 or width < 1 or height % s["patch_size"] or width % s["patch_size"]:
        raise UserError(f"image_size {height} x {width} is not a multiple of patch_size {s['patch_size']}: change one.")
    if s["embed_dim"] % s["num_heads"]:
        raise UserError(f"embed_dim {s['embed_dim']} is not a multiple of num_heads {s['num_heads']}: change one.")
    if not 0 <= s["local_up_to_layer"] < s["depth"]:
        raise UserError(
            f"local_up_to_layer is {s['local_up_to_layer']} of {s['depth']} blocks, but the class token "
            f"needs a block: give 0 to {s['depth'] - 1}."
        )
    for name in ("drop_rate", "attn_drop_rate", "drop_path_rate"):
        if not 0.0 <= s[name] < 1.0:
            raise UserError(f"{name} is {s[name]}: give a probability, at least 0 and below 1.")
    if s["dtype"] not in ("float32", "bfloat16"):
        raise UserError(f"dtype is {s['dtype']!r}: choose float32 or bfloat16.")
    if s["attention"] not in ("xla", "cudnn"):
        raise UserError(f"attention is {s['attention']!r}: choose xla or cudnn.")
    if s["attention"] == "cudnn":
        if s["dtype"] != "bfloat16":
            raise UserError(f"attention is cudnn, which takes bfloat16, but dtype is {s['dtype']}: change one.")
        size = s["embed_dim"] // s["num_heads"]
        if size % 8 or size > 128:
            raise UserError(
                f"attention is cudnn, which takes heads of 8, 16, ... 128 channels, but heads have {size}: "
                "change embed_dim or num_heads, or choose attention=xla."
            )


def new_model(settings: Settings, seed: int) -> VisionTransformer:
    """Returns a model with random parameters; UserError for a seed that is not between 0 and 2^32 - 1.

    The weights depend on the seed only, not on the machine's or JAX's default random number generator.
    """
    if not 0 <= seed < 2**32:
        raise UserError(f"seed is {seed}: it must be 0 to {2**32 - 1}.")
    return VisionTransformer(settings, rngs=nnx.Rngs(jax.random.key(seed, impl="threefry2x32")))


def abstract_model(settings: Settings) -> tuple[Any, Any]:
    """Returns (graphdef, parameters as a nested dict of jax.ShapeDtypeStruct) of model_settings()."""
    graphdef, params = nnx.split(nnx.eval_shape(lambda: new_model(settings, 0)))
    return graphdef, nnx.to_pure_dict(params)


def initial_params(settings: Settings, seed: int) -> Any:
    """Returns random parameters, a nested dict of float32 arrays."""
    return nnx.to_pure_dict(nnx.state(new_model(settings, seed)))


def count_params(params: Any) -> int:
    """Returns the number of parameters in a nested dict of arrays."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def count_macs(settings: Settings) -> int:
    """Returns the multiply-accumulates of one image's forward pass in matrix products; FLOPs are twice that.

    The positional term of GPSA costs N (rows + columns) D in a block. The last block computes only the tokens
    that have a head.
    """
    s, (rows, columns) = settings, patch_grid(settings)
    patches, dim = rows * columns, s["embed_dim"]
    local, depth = s["local_up_to_layer"], s["depth"]
    heads = 2 if s["distilled"] else 1  # each reads one token

    def block(tokens: int, queries: int) -> int:
        hidden = int(dim * s["mlp_ratio"])
        qkv, proj_and_mlp = tokens * 3 * dim * dim, queries * (dim * dim + 2 * dim * hidden)
        return qkv + 2 * queries * tokens * dim + proj_and_mlp

    patch_embed = patches * s["patch_size"] ** 2 * s["in_chans"] * dim
    gpsa = block(patches, patches) + patches * (rows + columns) * dim
    tokens = patches + heads
    plain = (depth - local - 1) * block(tokens, tokens) + block(tokens, heads)
    return patch_embed + local * gpsa + plain + heads * dim * s["num_classes"]
