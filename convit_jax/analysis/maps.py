"""Where each head looks: attention from one patch and from the class token, layer by layer.

For GPSA layers the two parts of A = (1 - s) content + s position (ConViT, section 3) and the gates
s = sigma(lambda) are given separately. Each layer gets its true input. Before training the positional part is
the convolutional init (Fig. 3).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convit_jax.errors import UserError
from convit_jax.models.attention import (
    GatedPositionalSelfAttention,
    SelfAttention,
    local_positional_weights,
)
from convit_jax.models.variants import new_model
from convit_jax.models.vit import VisionTransformer


@dataclasses.dataclass(frozen=True)
class LayerMaps:
    """Attention in one layer for one image, float32, per head and over the grid of patches.

    T is the number of class and distillation tokens: 0 before they join, then 1 or 2.

    Attributes:
      query: from the chosen patch, [H, rows, columns].
      query_tokens: from the chosen patch to the tokens, [H, T].
      gates: sigma(lambda), [H]; None in plain layers, like the next two.
      content, position: the two parts of `query`.
      tokens: from the tokens, [T, H, rows, columns].
      tokens_tokens: from the tokens to the tokens, [T, H, T].
    """

    query: np.ndarray
    query_tokens: np.ndarray
    gates: np.ndarray | None
    content: np.ndarray | None
    position: np.ndarray | None
    tokens: np.ndarray
    tokens_tokens: np.ndarray


def layer_maps(model: VisionTransformer, image: jax.Array | np.ndarray, query: tuple[int, int]) -> list[LayerMaps]:
    """Returns the attention maps of every layer.

    Args:
      model: in evaluation mode.
      image: float32 [H, W, C], normalised.
      query: (row, column) of a patch.
    """
    rows, columns = model.grid
    patches, patch = rows * columns, query[0] * columns + query[1]

    def over_grid(maps: jax.Array) -> jax.Array:
        return maps.reshape(*maps.shape[:-1], rows, columns)

    def look(attn: SelfAttention | GatedPositionalSelfAttention, x: jax.Array) -> dict[str, jax.Array | None]:
        extra = x.shape[1] - patches  # class and distillation token, once they joined
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

    return [
        LayerMaps(**jax.tree.map(lambda values, number=number: values[number], stack))
        for stack in jax.device_get(model.map_attention(jnp.asarray(image)[None], look))
        for number in range(len(stack["query"]))
    ]


def check_query(query: tuple[int, int] | None, grid: tuple[int, int]) -> tuple[int, int]:
    """Returns a (row, column) inside a grid of patches: the query, or the centre if it is None.

    Raises:
      UserError: the query is outside the grid.
    """
    rows, columns = grid
    if query is None:
        return rows // 2, columns // 2
    row, column = query
    if not (0 <= row < rows and 0 <= column < columns):
        raise UserError(
            f"query is {row},{column}, but the images have {rows} rows and {columns} columns of patches: "
            f"give 0,0 to {rows - 1},{columns - 1}."
        )
    return query


def init_maps(
    settings: dict[str, Any],
    seed: int,
    query: tuple[int, int],
    strengths: tuple[float, ...],
    image: jax.Array | np.ndarray | None = None,
) -> tuple[np.ndarray | None, list[np.ndarray]]:
    """Returns the attention of the first GPSA layer before training (Fig. 3).

    Args:
      settings: of VisionTransformer.
      seed: of the weights.
      query: (row, column) of a patch.
      strengths: locality strengths of the convolutional init.
      image: as of layer_maps, or None.

    Returns:
      (content, [position for each strength]), float32 [H, rows, columns] each. Content is None without an
      image. With conv_init=False there is one position, that of the ordinary init.

    Raises:
      UserError: the model has no GPSA layer.
    """
    if settings["local_up_to_layer"] == 0:
        raise UserError("this model has no GPSA layer, so nothing starts as a convolution: use a ConViT.")
    model = new_model(settings, seed)
    rows, columns = model.grid
    patch = query[0] * columns + query[1]
    content = None if image is None else layer_maps(model, image, query)[0].content
    attn = model.blocks[0].attn
    assert isinstance(attn, GatedPositionalSelfAttention)

    def position() -> np.ndarray:
        maps = attn.positional_probabilities()
        return jax.device_get(maps[:, patch]).reshape(-1, rows, columns)

    if not settings["conv_init"]:
        return content, [position()]
    kernel, positions = attn.pos_proj.kernel[...], []
    for strength in strengths:
        local = local_positional_weights(settings["num_heads"], strength)
        attn.pos_proj.kernel = nnx.Param(kernel.at[:, : local.shape[1]].set(local))
        positions.append(position())
    return content, positions
