"""Infers the architecture of a network from the names and shapes of its state dict.

Two things are in no shape: the number of heads of a network without GPSA blocks (a table of sizes tells
it by the width, or the caller does), and the sides of a grid of patches that is not square (the caller
tells them).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from convit_jax.errors import UserError
from convit_jax.models.variants import SIZES, model_settings

REQUIRED = {"patch_embed.proj.weight": 4, "pos_embed": 3, "cls_token": 3, "blocks.0.mlp.fc1.weight": 2}  # axes
GPSA_ONLY = {"attn.qk.weight", "attn.pos_proj.weight", "attn.gating_param"}
BIASES = {"attn.qk.bias", "attn.v.bias", "attn.qkv.bias"}
Size = tuple[int, int] | None  # (height, width) in pixels


def infer(
    tensors: Mapping[str, np.ndarray],
    source: str,
    *,
    trained_at: Size = None,
    num_heads: int | None = None,
    num_classes: int | None = None,
    image_size: Size = None,
) -> dict[str, Any]:
    """Returns the model_settings() of a state dict. `names.check_state_dict` finds what does not fit them.

    Args:
      tensors: {name: array} with the original's names.
      source: where they are from, for messages.
      trained_at: if known; else the grid is square, or that of `image_size`, which the caller wants.
      num_heads: for a network without GPSA blocks whose width is not in the table.
      num_classes: if the state dict has no head.

    Raises:
      UserError: the tensors are no vision transformer of this kind, or the caller must tell something.
    """
    blocks = [name.split(".", 2) for name in tensors if name.startswith("blocks.") and name.count(".") > 2]
    local = len({number for _, number, within in blocks if within in GPSA_ONLY})
    required = {**REQUIRED, **({"blocks.0.attn.gating_param": 1} if local else {})}
    if lacking := [name for name, axes in required.items() if not _has(tensors, name, axes)]:
        raise UserError(
            f"{source} holds no ConViT or DeiT (it has no usable {', '.join(lacking)}): "
            "give a checkpoint of such a model."
        )
    embed_dim, in_chans, patch_size, _ = tensors["patch_embed.proj.weight"].shape
    hidden = tensors["blocks.0.mlp.fc1.weight"].shape[0]
    ratio = hidden / embed_dim
    distilled = "dist_token" in tensors
    tokens = 2 if distilled else 1
    grid, extra = _grid(
        tensors["pos_embed"].shape[1],
        (0, tokens) if local else (tokens, 0),
        patch_size,
        [trained_at] if trained_at else [None, image_size],
        source,
    )
    if _has(tensors, "head.weight", 2):
        num_classes = tensors["head.weight"].shape[0]
    elif num_classes is None:
        raise UserError(f"{source} has no head: give the number of classes of a new one as num_classes.")
    biased = any(within in BIASES for _, _, within in blocks)
    if local:
        known = tensors["blocks.0.attn.gating_param"].shape[0]
        if num_heads not in (None, known):
            raise UserError(f"{source} has {known} heads, not {num_heads}: give no number of heads.")
        num_heads = known
    elif num_heads is None:
        table = heads_by_width(biased, extra > 0)
        if embed_dim not in table:
            raise UserError(
                f"{source} is a plain vision transformer of width {embed_dim}, which is none of those known "
                f"({', '.join(map(str, table))}): give its number of heads with --heads."
            )
        num_heads = table[embed_dim]
    return model_settings(
        "convit_tiny",  # every setting that differs between models is given
        num_classes=num_classes,
        image_size=(grid[0] * patch_size, grid[1] * patch_size),
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


def heads_by_width(qkv_bias: bool, pos_embed_class_token: bool) -> dict[int, int]:
    """Returns {embed_dim: num_heads} for networks without GPSA blocks, which may still be a ConViT."""
    family = "deit" if qkv_bias or pos_embed_class_token else "convit"
    return dict(size for name, size in SIZES.items() if name.startswith(family))


def _has(tensors: Mapping[str, np.ndarray], name: str, axes: int) -> bool:
    """Whether there is a tensor of this name and number of axes that is not empty."""
    return name in tensors and tensors[name].ndim == axes and tensors[name].size > 0


def _grid(
    positions: int, extras: Sequence[int], patch_size: int, sizes: Sequence[Size], source: str
) -> tuple[tuple[int, int], int]:
    """((rows, columns), number of entries for class and distillation token) of a position embedding.

    Both candidates for that number and sizes of images (None for any square) come with the likelier first.
    """
    for extra in extras:
        side = math.isqrt(max(positions - extra, 0))
        for size in sizes:
            rows, columns = (size[0] // patch_size, size[1] // patch_size) if size else (side, side)
            if rows * columns == positions - extra > 0:
                return (rows, columns), extra
    wanted = f"images of {sizes[0][0]} x {sizes[0][1]} pixels do not have" if sizes[0] else "make no square"
    raise UserError(
        f"the position embedding in {source} is for {positions} positions, which {wanted}: give the "
        "size of the training images with image_size=HEIGHTxWIDTH; a second conversion can then resize it."
    )
