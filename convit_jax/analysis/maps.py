"""What each head looks at: attention from one patch and from the class token, layer by layer.

Of a GPSA layer the two parts of A = (1 - s) content + s position stand apart (ConViT, section 3), with
the gates s = sigma(lambda). Everything is computed on the true inputs of each layer, by the model's own
methods. Before training the positional part is the convolutional init (Fig. 3).
"""

import dataclasses

import jax
import numpy as np
from flax import nnx

from convit_jax.errors import UserError
from convit_jax.models.attention import GatedPositionalSelfAttention, local_positional_weights
from convit_jax.models.variants import new_model


@dataclasses.dataclass(frozen=True)
class LayerMaps:
    """Attention in one layer for one image, float32, per head and over the grid of patches.

    query: from the patch that was asked for, [H, rows, columns]. query_tokens: its attention to class (and
    distillation) token, [H, 0, 1 or 2].
    gates, content, position: of GPSA only, else None: sigma(lambda) [H], and the two parts of `query`.
    tokens: from class (and distillation) token, [T, H, rows, columns], T = 0 before they join.
    tokens_tokens: their attention to each other and to themselves, [T, H, T].
    """

    query: np.ndarray
    query_tokens: np.ndarray
    gates: np.ndarray | None
    content: np.ndarray | None
    position: np.ndarray | None
    tokens: np.ndarray
    tokens_tokens: np.ndarray


def layer_maps(model, image, query):
    """List over layers of LayerMaps.

    Args:
      model: a VisionTransformer. image: float32 [H, W, C], normalised. query: (row, column) of a patch.
    """
    rows, columns = model.grid
    patches, patch = rows * columns, query[0] * columns + query[1]

    def over_grid(maps):
        return maps.reshape(*maps.shape[:-1], rows, columns)

    def look(attn, x):
        extra = x.shape[1] - patches  # class and distillation token, once they joined
        whole = attn.attention_maps(x)[0]  # [H, N, N]
        of_tokens = whole[:, :extra].transpose(1, 0, 2)
        gated = isinstance(attn, GatedPositionalSelfAttention)
        return dict(
            query=over_grid(whole[:, extra + patch, extra:]),
            query_tokens=whole[:, extra + patch, :extra],
            gates=attn.gates() if gated else None,
            content=over_grid(attn.content_maps(x)[0, :, patch]) if gated else None,
            position=over_grid(attn.positional_probabilities()[:, patch]) if gated else None,
            tokens=over_grid(of_tokens[..., extra:]),
            tokens_tokens=of_tokens[..., :extra],
        )

    layers = []
    for stack in jax.device_get(model.map_attention(image[None], look)):
        for number in range(len(stack["query"])):
            layers.append(LayerMaps(**jax.tree.map(lambda values, number=number: values[number], stack)))
    return layers


def check_query(query, grid):
    """A (row, column) that lies in a grid of patches; None gives the centre. Raises UserError."""
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


def init_maps(settings, seed, query, strengths, image=None):
    """Attention of the first GPSA layer before training (Fig. 3), float32 [H, rows, columns] each.

    Args:
      settings: of VisionTransformer. seed: of the weights. query: (row, column) of a patch. strengths:
        locality strengths of the convolutional init. image: as of layer_maps, or None.

    Returns:
      (content, [position for each strength]): content is None without an image. With conv_init=False there
      is one position, that of the ordinary init.

    Raises:
      UserError: the model has no GPSA layer.
    """
    if settings["local_up_to_layer"] == 0:
        raise UserError(
            "this model has no GPSA layer, so nothing in it starts as a convolution: take a ConViT."
        )
    model = new_model(settings, seed)
    rows, columns = model.grid
    patch = query[0] * columns + query[1]

    def over_grid(maps):
        return jax.device_get(maps[:, patch]).reshape(-1, rows, columns)

    content = None
    attn = model.blocks[0].attn
    if image is not None:
        content = layer_maps(model, image, query)[0].content
    if not settings["conv_init"]:
        return content, [over_grid(attn.positional_probabilities())]
    kernel, positions = attn.pos_proj.kernel[...], []
    for strength in strengths:
        local = local_positional_weights(settings["num_heads"], strength)
        attn.pos_proj.kernel = nnx.Param(kernel.at[:, : local.shape[1]].set(local))
        positions.append(over_grid(attn.positional_probabilities()))
    return content, positions
