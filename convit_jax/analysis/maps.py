"""Where each head looks, layer by layer: from one patch and from the class token, or from every token.

For GPSA layers the two parts of A = (1 - s) content + s position (ConViT, section 3) and the gates
s = sigma(lambda) are given separately. Each layer gets its true input.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convit_jax.errors import UserError
from convit_jax.models.attention import GatedPositionalSelfAttention, SelfAttention, local_positional_weights
from convit_jax.models.variants import new_model
from convit_jax.models.vit import VisionTransformer


@dataclasses.dataclass(frozen=True)
class LayerMaps:
    """Attention in one layer for one image, float32, per head and over the grid of patches.

    T is the number of class and distillation tokens: 0 before they join, then 1 or 2.
    """

    query: np.ndarray  # from the chosen patch, [H, rows, columns]
    query_tokens: np.ndarray  # from the chosen patch to the tokens, [H, T]
    gates: np.ndarray | None  # sigma(lambda), [H]; None in plain layers, like the next two
    content: np.ndarray | None  # the two parts of `query`
    position: np.ndarray | None
    tokens: np.ndarray  # from the tokens, [T, H, rows, columns]
    tokens_tokens: np.ndarray  # from the tokens to the tokens, [T, H, T]


@dataclasses.dataclass(frozen=True)
class FullMaps:
    """Attention of all tokens in one layer for one image, float32 per head; T as in LayerMaps.

    Position is the outer product of its factors, see models/attention.py.
    """

    content: np.ndarray  # [H, T + N, T + N]; in plain layers all of the attention
    gates: np.ndarray | None  # sigma(lambda), [H]; None in plain layers, like the next two
    rows: np.ndarray | None  # A_y, [H, rows, rows]
    columns: np.ndarray | None  # A_x, [H, columns, columns]


def layer_maps(model: VisionTransformer, image: jax.Array | np.ndarray, query: tuple[int, int]) -> list[LayerMaps]:
    """Returns the attention maps of every layer, for an image float32 [H, W, C], normalised, and a patch.

    The model must be in evaluation mode; the query is the (row, column) of the patch.
    """
    rows, columns = model.grid
    patch = query[0] * columns + query[1]

    def over_grid(maps: jax.Array) -> jax.Array:
        return maps.reshape(*maps.shape[:-1], rows, columns)

    def look(attn: SelfAttention | GatedPositionalSelfAttention, x: jax.Array) -> dict[str, jax.Array | None]:
        extra = x.shape[1] - rows * columns  # class and distillation token, once they joined
        whole = attn.attention_maps(x)[0]  # [H, N, N]
        of_tokens = whole[:, :extra].transpose(1, 0, 2)
        gpsa = attn if isinstance(attn, GatedPositionalSelfAttention) else None
        return dict(
            query=over_grid(whole[:, extra + patch, extra:]),
            query_tokens=whole[:, extra + patch, :extra],
            gates=gpsa.gates() if gpsa else None,
            content=over_grid(gpsa.content_maps(x)[0, :, patch]) if gpsa else None,
            position=over_grid(gpsa.positional_probabilities()[:, patch]) if gpsa else None,
            tokens=over_grid(of_tokens[..., extra:]),
            tokens_tokens=of_tokens[..., :extra],
        )

    return [LayerMaps(**layer) for layer in _of_layers(model, image, look)]


def full_maps(model: VisionTransformer, image: jax.Array | np.ndarray) -> list[FullMaps]:
    """Returns the attention of all tokens in every layer, for an image as `layer_maps` takes it."""

    def look(attn: SelfAttention | GatedPositionalSelfAttention, x: jax.Array) -> dict[str, jax.Array | None]:
        if isinstance(attn, SelfAttention):
            return dict(content=attn.attention_maps(x)[0], gates=None, rows=None, columns=None)
        rows, columns = attn.positional_factors()
        return dict(content=attn.content_maps(x)[0], gates=attn.gates(), rows=rows, columns=columns)

    return [FullMaps(**layer) for layer in _of_layers(model, image, look)]


def _of_layers(
    model: VisionTransformer, image: jax.Array | np.ndarray, look: Callable[[Any, jax.Array], dict[str, Any]]
) -> list[dict[str, Any]]:
    """What look(attn, x) returns in every layer, as numpy arrays; x is the layer's input [1, N, D]."""
    return [
        jax.tree.map(lambda values, number=number: values[number], stack)
        for stack in jax.device_get(model.map_attention(jnp.asarray(image)[None], look))
        for number in range(len(jax.tree.leaves(stack)[0]))
    ]


def init_maps(
    settings: dict[str, Any], seed: int, query: tuple[int, int], image: jax.Array | np.ndarray | None = None
) -> tuple[np.ndarray | None, dict[float | None, np.ndarray]]:
    """Returns the attention of a patch in the first GPSA layer before training (Fig. 3), as `layer_maps` takes it.

    Returns:
      (content, position by locality strength), float32 [H, rows, columns] each. Content is None without an
      image. The strengths are half the model's, its own and twice it; with conv_init=False only None, the
      ordinary init. UserError without a GPSA layer.
    """
    if settings["local_up_to_layer"] == 0:
        raise UserError("this model has no GPSA layer, so nothing starts as a convolution: use a ConViT.")
    model = new_model(settings, seed)
    rows, columns = model.grid
    content = None if image is None else layer_maps(model, image, query)[0].content
    attn = model.blocks[0].attn
    assert isinstance(attn, GatedPositionalSelfAttention)
    kernel, alpha = attn.pos_proj.kernel[...], settings["locality_strength"]
    positions: dict[float | None, np.ndarray] = {}
    for strength in (alpha / 2, alpha, 2 * alpha) if settings["conv_init"] else (None,):
        if strength is not None:
            local = local_positional_weights(settings["num_heads"], strength)
            attn.pos_proj.kernel = nnx.Param(kernel.at[:, : local.shape[1]].set(local))
        maps = attn.positional_probabilities()[:, query[0] * columns + query[1]]
        positions[strength] = jax.device_get(maps).reshape(-1, rows, columns)
    return content, positions
