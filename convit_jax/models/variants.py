"""The twelve models of the paper's Table 1, in one table, and `create_model`.

dim = 48 x heads (ConViT) or 64 x heads (DeiT and the "plus" models); the rest is common:
12 blocks, patches of 16, MLP ratio 4; ConViT's first ten blocks are GPSA.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from convit_jax.errors import UserError, nearest
from convit_jax.models.vit import VisionTransformer

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
COMMON = dict(
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
FAMILIES = {
    "convit": dict(qkv_bias=False, local_up_to_layer=10, pos_embed_class_token=False),
    "deit": dict(qkv_bias=True, local_up_to_layer=0, pos_embed_class_token=True),
}
OVERRIDES = ("embed_dim", "num_heads", *COMMON, *FAMILIES["convit"])


def list_models():
    """Names of all models of Table 1: ConViT, then DeiT, by size."""
    return list(SIZES)


def model_settings(name, *, num_classes=1000, image_size=224, **overrides):
    """Every argument of VisionTransformer but rngs, for a model of the table.

    Raises UserError for an unknown name or override and for sizes that do not fit together.
    """
    if name not in SIZES:
        raise UserError(
            f"there is no model {name!r}{nearest(name, SIZES)} The models are: {', '.join(SIZES)}."
        )
    for override in overrides:
        if override not in OVERRIDES:
            raise UserError(
                f"a model has no setting {override!r}{nearest(override, OVERRIDES)} "
                f"The settings are: {', '.join(sorted(OVERRIDES))}."
            )
    embed_dim, num_heads = SIZES[name]
    settings = dict(COMMON, embed_dim=embed_dim, num_heads=num_heads, **FAMILIES[name.split("_")[0]])
    settings.update(overrides, num_classes=num_classes)
    settings["image_size"] = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    _check(settings)
    return settings


def _check(s):
    """One sentence for sizes that cannot be built."""
    height, width = s["image_size"]
    positive = ("patch_size", "in_chans", "num_classes", "embed_dim", "num_heads", "depth", "scan_unroll")
    for name in positive:
        if s[name] < 1:
            raise UserError(f"{name} is {s[name]}: it must be at least 1.")
    if height < 1 or width < 1 or height % s["patch_size"] or width % s["patch_size"]:
        raise UserError(
            f"image_size {height} x {width} is not a multiple of patch_size {s['patch_size']}: change one."
        )
    if s["embed_dim"] % s["num_heads"]:
        raise UserError(
            f"embed_dim {s['embed_dim']} is not a multiple of num_heads {s['num_heads']}: change one."
        )
    if not 0 <= s["local_up_to_layer"] < s["depth"]:
        raise UserError(
            f"local_up_to_layer is {s['local_up_to_layer']} of {s['depth']} blocks: at least one block "
            f"must be left for the class token, so give 0 to {s['depth'] - 1}."
        )
    for name in ("drop_rate", "attn_drop_rate", "drop_path_rate"):
        if not 0.0 <= s[name] < 1.0:
            raise UserError(f"{name} is {s[name]}: it is a probability, from 0 to below 1.")
    if s["dtype"] not in ("float32", "bfloat16"):
        raise UserError(f"dtype is {s['dtype']!r}: choose float32 or bfloat16.")
    if s["attention"] not in ("xla", "cudnn"):
        raise UserError(f"attention is {s['attention']!r}: choose xla or cudnn.")
    if s["attention"] == "cudnn":
        head = s["embed_dim"] // s["num_heads"]
        if s["dtype"] != "bfloat16":
            raise UserError(
                f"attention is cudnn and dtype {s['dtype']}: its kernel takes bfloat16; change one."
            )
        if head % 8 or head > 128:
            raise UserError(
                f"attention is cudnn with heads of {head}: its kernel takes multiples of 8 up to 128; "
                "change embed_dim or num_heads, or choose attention=xla."
            )


def create_model(name, *, num_classes=1000, image_size=224, seed=0, **overrides):
    """A model with random weights.

    Args:
      name: one of list_models().
      num_classes: size of the head. image_size: pixels, an int or (height, width).
      seed: of the weights; the same seed gives the same weights.
      **overrides: any other argument of VisionTransformer, as embed_dim=64 or dtype="bfloat16".

    Returns:
      A VisionTransformer (flax.nnx.Module): model(images [B, H, W, 3]) -> logits [B, num_classes].

    Raises:
      UserError: unknown name or override, or sizes that do not fit together.
    """
    settings = model_settings(name, num_classes=num_classes, image_size=image_size, **overrides)
    return new_model(settings, seed)


def new_model(settings, seed):
    """A VisionTransformer of a model_settings() with random parameters; UserError if the seed is none."""
    check_seed(seed)
    graphdef, _ = abstract_model(settings)
    return nnx.merge(graphdef, initial_params(settings, seed))


def check_seed(seed):
    """Refuse a seed that is none; UserError."""
    if not 0 <= seed < 2**32:
        raise UserError(f"seed is {seed}: it must be 0 to {2**32 - 1}.")


def abstract_model(settings):
    """(graphdef, params as a nested dict of jax.ShapeDtypeStruct) of a model_settings()."""
    graphdef, params = nnx.split(nnx.eval_shape(lambda: VisionTransformer(**settings, rngs=nnx.Rngs(0))))
    return graphdef, nnx.to_pure_dict(params)


def initial_params(settings, seed):
    """Random parameters as a nested dict of float32 arrays, by one program for all seeds (below 2^32)."""

    def init(seed):
        return nnx.to_pure_dict(nnx.state(VisionTransformer(**settings, rngs=nnx.Rngs(jax.random.key(seed)))))

    return jax.jit(init)(jnp.asarray(seed, jnp.uint32))


def count_params(params):
    """Number of parameters in a nested dict of arrays."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def count_macs(settings):
    """Multiply-accumulates of one image's forward pass through matrix products; FLOPs are twice that.

    Settings as of model_settings(). The positional term of GPSA costs N (rows + columns) D a block; of
    the last block only the tokens that have a head are computed.
    """
    s, (height, width) = settings, settings["image_size"]
    rows, columns, dim = height // s["patch_size"], width // s["patch_size"], s["embed_dim"]
    patches = rows * columns
    local, depth = s["local_up_to_layer"], s["depth"]
    heads = 2 if s["distilled"] else 1  # each with a token of its own

    def block(tokens, queries):
        hidden = int(dim * s["mlp_ratio"])
        qkv, proj_and_mlp = tokens * 3 * dim * dim, queries * (dim * dim + 2 * dim * hidden)
        return qkv + 2 * queries * tokens * dim + proj_and_mlp

    patch_embed = patches * s["patch_size"] ** 2 * s["in_chans"] * dim
    gpsa = block(patches, patches) + patches * (rows + columns) * dim
    tokens = patches + heads
    plain = (depth - local - 1) * block(tokens, tokens) + block(tokens, heads)
    return patch_embed + local * gpsa + plain + heads * dim * s["num_classes"]
