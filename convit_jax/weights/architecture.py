"""Infers the architecture of a network from the names and shapes of its state dict.

Two things are in no shape: the number of heads of a network without GPSA blocks (a table of sizes tells it by the
width, or `num_heads` does), and the sides of a grid of patches that is not square (`image_size` tells them).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from convit_jax.errors import UserError
from convit_jax.models.variants import SIZES, model_settings

REQUIRED = {  # and their axes
    "patch_embed.proj.weight": 4,
    "pos_embed": 3,
    "cls_token": 3,
    "blocks.0.mlp.fc1.weight": 2,
}
GPSA_ONLY = {"attn.qk.weight", "attn.pos_proj.weight", "attn.gating_param"}
BIASES = {"attn.qk.bias", "attn.v.bias", "attn.qkv.bias"}


def infer(
    tensors: Mapping[str, np.ndarray],
    source: str,
    *,
    trained_size: tuple[int, int] | None = None,
    image_size: tuple[int, int] | None = None,
    num_heads: int | None = None,
) -> dict[str, Any]:
    """Returns the model_settings() of a state dict. `names.check_state_dict` finds what does not fit them.

    trained_size: of the images, if it is known. image_size: what it is if the patches make no square.
    """
    blocks = [name.split(".", 2) for name in tensors if name.startswith("blocks.") and name.count(".") > 2]
    local = len({number for _, number, within in blocks if within in GPSA_ONLY})
    required = REQUIRED | ({"blocks.0.attn.gating_param": 1} if local else {})
    shapes = {name: tensor.shape for name, tensor in tensors.items() if tensor.size}
    if lacking := [name for name, axes in required.items() if len(shapes.get(name, ())) != axes]:
        raise UserError(
            f"{source} holds no ConViT or DeiT under the names of timm and the authors (it has no usable "
            f"{', '.join(lacking)}; it has {', '.join(list(tensors)[:2])}): give a checkpoint with their names."
        )
    embed_dim, in_chans, patch_size, _ = shapes["patch_embed.proj.weight"]
    hidden = shapes["blocks.0.mlp.fc1.weight"][0]
    ratio = hidden / embed_dim
    distilled = "dist_token" in tensors
    tokens = 2 if distilled else 1
    extras = (0, tokens) if local else (tokens, 0)
    (rows, columns), extra = _grid(shapes["pos_embed"][1], extras, patch_size, (trained_size, image_size), source)
    biased = any(within in BIASES for _, _, within in blocks)
    if num_heads is None and local:
        num_heads = shapes["blocks.0.attn.gating_param"][0]
    elif num_heads is None:
        family = "deit" if biased or extra else "convit"  # which may have no GPSA blocks
        known = dict(size for name, size in SIZES.items() if name.startswith(family))
        if embed_dim not in known:
            raise UserError(
                f"{source} is a plain vision transformer of width {embed_dim}, which is none of those known "
                f"({', '.join(map(str, known))}): give its number of heads with --heads."
            )
        num_heads = known[embed_dim]
    return model_settings(
        "convit_tiny",  # every setting that differs between models is given
        num_classes=shapes.get("head.weight", (0,))[0],
        image_size=(rows * patch_size, columns * patch_size),
        patch_size=patch_size,
        in_chans=in_chans,
        embed_dim=embed_dim,
        depth=len({number for _, number, _ in blocks}),
        num_heads=num_heads,
        mlp_ratio=ratio if int(embed_dim * ratio) == hidden else math.nextafter(ratio, math.inf),
        qkv_bias=biased,
        local_up_to_layer=local,
        pos_embed_class_token=extra > 0,
        distilled=distilled,
    )


def _grid(
    positions: int, extras: Sequence[int], patch_size: int, sizes: Sequence[tuple[int, int] | None], source: str
) -> tuple[tuple[int, int], int]:
    """((rows, columns), number of entries for class and distillation token) of a position embedding.

    `extras` are the two candidates for that number, the likelier first; `sizes` the image sizes to try before and
    after a square.
    """
    first, last = ([side // patch_size for side in size or (0, 0)] for size in sizes)
    candidates = [(first, extra) for extra in extras]
    for extra in extras:
        side = math.isqrt(max(positions - extra, 0))
        candidates += [([side, side], extra), (last, extra)]
    for (rows, columns), extra in candidates:
        if rows * columns == positions - extra > 0:
            return (rows, columns), extra
    raise UserError(
        f"the position embedding in {source} is for {positions} positions, which make no square: give "
        "the size of the training images with image_size=HEIGHTxWIDTH; a second conversion can resize it."
    )
