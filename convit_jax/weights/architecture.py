"""Infers the architecture of a network from the names and shapes of its state dict.

Two things are in no shape: the number of heads of a network without GPSA blocks (a table of sizes tells
it by the width, or the caller does), and the sides of a grid of patches that is not square (the caller
tells them).
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from convit_jax.errors import UserError
from convit_jax.models.variants import SIZES, model_settings

REQUIRED = {
    "patch_embed.proj.weight": 4,
    "pos_embed": 3,
    "cls_token": 3,
    "blocks.0.mlp.fc1.weight": 2,
}  # axes
GPSA_ONLY = {"attn.qk.weight", "attn.pos_proj.weight", "attn.gating_param"}


def infer(
    tensors: Mapping[str, np.ndarray],
    source: str,
    *,
    trained_at: tuple[int, int] | None = None,
    num_heads: int | None = None,
    num_classes: int | None = None,
    image_size: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Returns the model_settings() of a state dict.

    Args:
      tensors: {name: array} with the original's names.
      source: where they are from, for messages.
      trained_at: (height, width) in pixels, if known; else the grid is square, or that of `image_size`.
      num_heads: for a network without GPSA blocks whose width is not in the table.
      num_classes: if the state dict has no head.
      image_size: (height, width) wanted, if any.

    Raises:
      UserError: the tensors are no vision transformer of this kind, or the caller must tell something.
    """
    lacking = [name for name, axes in REQUIRED.items() if not _has(tensors, name, axes)]
    if lacking:
        raise UserError(
            f"{source} holds no ConViT or DeiT (it has no usable {', '.join(lacking)}): "
            "give a checkpoint of such a model."
        )
    embed_dim, in_chans, patch_size, _ = tensors["patch_embed.proj.weight"].shape
    blocks = _names_by_block(tensors, source)
    local = _leading_gpsa_blocks(blocks, source)
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
    biased = any({"attn.qk.bias", "attn.v.bias", "attn.qkv.bias"} & names for names in blocks)
    family = _family(local, biased, extra > 0)
    if local:
        num_heads = _heads_shown(tensors, source, num_heads)
    else:
        num_heads = _heads_of_width(embed_dim, family, source, num_heads)
    name = next((name for name, size in _sizes(family).items() if size == (embed_dim, num_heads)), f"{family}_tiny")
    return model_settings(
        name,
        num_classes=num_classes,
        image_size=(grid[0] * patch_size, grid[1] * patch_size),
        patch_size=patch_size,
        in_chans=in_chans,
        embed_dim=embed_dim,
        depth=len(blocks),
        num_heads=num_heads,
        mlp_ratio=ratio if int(embed_dim * ratio) == hidden else math.nextafter(ratio, math.inf),
        qkv_bias=biased,
        local_up_to_layer=local,
        pos_embed_class_token=extra > 0,
        distilled=distilled,
    )


def inferred_heads(settings: Mapping[str, Any]) -> int | None:
    """Returns the number of heads that `infer` finds for a state dict of these model_settings(), if any."""
    if settings["local_up_to_layer"]:
        return settings["num_heads"]
    family = _family(0, settings["qkv_bias"], settings["pos_embed_class_token"])
    return dict(_sizes(family).values()).get(settings["embed_dim"])


def _family(local: int, biased: bool, class_token_has_position: bool) -> str:
    """A network without GPSA blocks may still be a ConViT."""
    return "convit" if local or not (biased or class_token_has_position) else "deit"


def _sizes(family: str) -> dict[str, tuple[int, int]]:
    """{name: (width, heads)} of a family."""
    return {name: size for name, size in SIZES.items() if name.startswith(family)}


def _has(tensors: Mapping[str, np.ndarray], name: str, axes: int) -> bool:
    """Whether there is a tensor of this name and number of axes that is not empty."""
    return name in tensors and tensors[name].ndim == axes and tensors[name].size > 0


def _names_by_block(tensors: Mapping[str, np.ndarray], source: str) -> list[set[str]]:
    """Of each block, the names within it."""
    blocks: dict[int, set[str]] = {}
    for name in tensors:
        if block := re.fullmatch(r"blocks\.(\d{1,4})\.(.+)", name):
            blocks.setdefault(int(block[1]), set()).add(block[2])
    for number in range(len(blocks)):
        if number not in blocks:
            raise UserError(f"{source} has no block {number} but later ones: give a complete checkpoint.")
    return [blocks[number] for number in range(len(blocks))]


def _leading_gpsa_blocks(blocks: Sequence[set[str]], source: str) -> int:
    local = [number for number, names in enumerate(blocks) if names & GPSA_ONLY]
    if local != list(range(len(local))):
        raise UserError(
            f"in {source} the blocks {', '.join(map(str, local))} have GPSA: they must be the first ones, "
            "so give a checkpoint of a ConViT."
        )
    return len(local)


def _heads_shown(tensors: Mapping[str, np.ndarray], source: str, given: int | None) -> int:
    """Number of heads of the positional projections and gates."""
    telling = [name for name in tensors if name.endswith(("attn.pos_proj.weight", "attn.gating_param"))]
    known = {tensors[name].shape[0] for name in telling if tensors[name].ndim}
    if len(known) != 1 or given not in (None, *known):
        counts = ", ".join(map(str, sorted(known))) or "no"
        asked = f", not {given}" if given else ""
        raise UserError(
            f"{source} has positional projections of {counts} heads{asked}: give no number of heads, "
            "and a checkpoint in which all blocks agree."
        )
    return known.pop()


def _heads_of_width(embed_dim: int, family: str, source: str, given: int | None) -> int:
    """Number of heads as given, or of the table."""
    table = dict(_sizes(family).values())
    if given is None and embed_dim not in table:
        raise UserError(
            f"{source} is a plain vision transformer of width {embed_dim}, which is none of "
            f"{'ConViT' if family == 'convit' else 'DeiT'}'s ({', '.join(map(str, table))}): "
            "give its number of heads with --heads."
        )
    return table[embed_dim] if given is None else given


def _grid(
    positions: int,
    extras: Sequence[int],
    patch_size: int,
    sizes: Sequence[tuple[int, int] | None],
    source: str,
) -> tuple[tuple[int, int], int]:
    """((rows, columns), number of entries for class and distillation token) of a position embedding.

    `extras` are possible numbers of such entries, the likelier first; `sizes` those of images to try with
    each, None for any square.
    """
    for extra in extras:
        for size in sizes:
            if size is not None:
                rows, columns = size[0] // patch_size, size[1] // patch_size
            else:
                rows = columns = math.isqrt(max(positions - extra, 0))
            if rows * columns == positions - extra > 0:
                return (rows, columns), extra
    if sizes[0] is not None:
        size_text = f"images of {sizes[0][0]} x {sizes[0][1]} pixels in patches of {patch_size} do not have"
        raise UserError(f"the position embedding in {source} is for {positions} positions, which {size_text}.")
    raise UserError(
        f"the position embedding in {source} is for {positions} positions, which make no square: give the "
        "size of the training images with image_size=HEIGHTxWIDTH; a second conversion can then resize it."
    )
