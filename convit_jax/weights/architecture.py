"""What a network is, read off the names and shapes of its state dict.

Sizes stand in the shapes: blocks with a positional projection are GPSA, and it tells the number of
heads. What no shape tells: the heads of a network without any (a table of sizes does: ConViT's if it has
neither biases nor a position of the class token, else DeiT's; or the caller), and the shape of a grid that
is not square (the caller).
"""

import math
import re

from convit_jax.errors import UserError
from convit_jax.models.variants import SIZES, model_settings

VITAL = {"patch_embed.proj.weight": 4, "pos_embed": 3, "cls_token": 3, "blocks.0.mlp.fc1.weight": 2}  # axes
GPSA_ONLY = ("attn.qk.weight", "attn.pos_proj.weight", "attn.gating_param")


def infer(tensors, source, *, trained_at=None, num_heads=None, num_classes=None, image_size=None):
    """The model_settings() of a state dict.

    Args:
      tensors: {name: array} with the original's names. source: its name, for messages.
      trained_at: (height, width) in pixels, if known; else its grid is square, or that of image_size.
      num_heads: for a DeiT that is not in the table.
      num_classes: if the state dict has no head.
      image_size: (height, width) wanted, if any.

    Raises:
      UserError: not a vision transformer of this kind, or something that only the caller can tell.
    """
    lacking = [name for name, axes in VITAL.items() if name not in tensors or _size(tensors[name], axes) == 0]
    if lacking:
        raise UserError(
            f"{source} holds no ConViT or DeiT (it has no usable {', '.join(lacking)}): give a checkpoint of "
            "such a model."
        )

    embed_dim, in_chans, patch_size, _ = tensors["patch_embed.proj.weight"].shape
    inside = {}  # of each block, the names within it
    for name in tensors:
        if block := re.fullmatch(r"blocks\.(\d{1,4})\.(.+)", name):
            inside.setdefault(int(block[1]), set()).add(block[2])
    depth = len(inside)
    gaps = sorted({*range(depth)} - {*inside})
    if gaps:
        raise UserError(f"{source} has no block {gaps[0]} but later ones: give a checkpoint that is whole.")
    local = sorted(number for number, names in inside.items() if names & {*GPSA_ONLY})
    if local != list(range(len(local))):
        raise UserError(
            f"in {source} the blocks {', '.join(map(str, local))} have GPSA: they must be the first ones."
        )
    hidden = tensors["blocks.0.mlp.fc1.weight"].shape[0]
    ratio = hidden / embed_dim
    distilled = "dist_token" in tensors
    tokens = 2 if distilled else 1
    extras = (0, tokens) if local else (tokens, 0)
    positions, known = tensors["pos_embed"].shape[1], [trained_at] if trained_at else [None, image_size]
    grid, extra = _grid(positions, extras, patch_size, known, source)
    if "head.weight" in tensors and _size(tensors["head.weight"], 2):
        num_classes = tensors["head.weight"].shape[0]
    elif num_classes is None:
        raise UserError(f"{source} has no head: say with num_classes how many classes a new one shall have.")
    biased = any({"attn.qk.bias", "attn.v.bias", "attn.qkv.bias"} & names for names in inside.values())
    family = "convit" if local or not (biased or extra) else "deit"  # a ConViT may have no GPSA block
    num_heads = _heads(tensors, source, family, embed_dim, num_heads, shown=bool(local))
    sizes = {name: size for name, size in SIZES.items() if name.startswith(family)}
    name = next((name for name, size in sizes.items() if size == (embed_dim, num_heads)), f"{family}_tiny")
    return model_settings(
        name,
        num_classes=num_classes,
        image_size=(grid[0] * patch_size, grid[1] * patch_size),
        patch_size=patch_size,
        in_chans=in_chans,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=ratio if int(embed_dim * ratio) == hidden else math.nextafter(ratio, math.inf),
        qkv_bias=biased,
        local_up_to_layer=len(local),
        pos_embed_class_token=extra > 0,
        distilled=distilled,
    )


def told_heads(settings):
    """The number of heads that infer() takes a state dict of these model_settings() to have, or None."""
    if settings["local_up_to_layer"]:
        return settings["num_heads"]
    convit = not (settings["qkv_bias"] or settings["pos_embed_class_token"])
    return _table("convit" if convit else "deit").get(settings["embed_dim"])


def _table(family):
    """{width: heads} of a family."""
    return {size[0]: size[1] for name, size in SIZES.items() if name.startswith(family)}


def _size(tensor, axes):
    """Number of elements of a tensor with so many axes, 0 for any other."""
    return tensor.size if tensor.ndim == axes else 0


def _heads(tensors, source, family, embed_dim, given, shown):
    """Number of heads: of the positional projection if that is shown, or of the table, or as given."""
    if shown:
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
    table = _table(family)
    if given is None and embed_dim not in table:
        raise UserError(
            f"{source} is a plain vision transformer of width {embed_dim}, which is none of "
            f"{'ConViT' if family == 'convit' else 'DeiT'}'s ({', '.join(map(str, table))}): say how many "
            "heads it has, with --heads."
        )
    return table[embed_dim] if given is None else given


def _grid(positions, extras, patch_size, sizes, source):
    """((rows, columns), number of entries for class and distillation token) of a position embedding.

    extras: possible numbers of such entries, the likelier first. sizes: of images, to try in turn with each;
    None: any square.
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
        size = f"images of {sizes[0][0]} x {sizes[0][1]} pixels in patches of {patch_size} do not have"
        raise UserError(f"the position embedding in {source} is for {positions} positions, which {size}.")
    raise UserError(
        f"the position embedding in {source} is for {positions} positions, which make no square: say with "
        "image_size=HEIGHTxWIDTH at which size it was trained, a second conversion can then resize it."
    )
