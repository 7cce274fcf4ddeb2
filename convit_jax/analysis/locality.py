"""Where attention looks: centres and spans of its positional term, and non-locality.

Non-locality (ConViT, Eq. 8) is the distance from query to key in patches, averaged with the attention:

    D_h = (1 / N) sum_ij A_hij |delta_ij|, mean over images.

It is measured among patches. Where the class token takes part, the attention of the patches to each other is
normalised to 1 again, as if the token were absent, so that uniform attention means the same in every block:
7.281 on a 14 x 14 grid.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convit_jax.models.attention import GatedPositionalSelfAttention, SelfAttention
from convit_jax.models.vit import VisionTransformer


def centres_and_spans(model: VisionTransformer) -> tuple[jax.Array, jax.Array]:
    """Returns where positional attention looks, and how widely, in patches: float32 [L, H, 2] and [L, H].

    Centre and span are mean and standard deviation of the offset (dx, dy) under softmax(v_h . r) over all offsets
    of the grid, the variance being the mean of those along x and y. Where the Gaussian of v = (w1, w2, w3) fits
    into the grid, they are (-w1, -w2) / (2 w3) and 1 / sqrt(-2 w3). Unlike those they also exist for w3 >= 0.
    """
    attn = model.gpsa_blocks and model.gpsa_blocks.attn
    assert isinstance(attn, GatedPositionalSelfAttention)
    weights = attn.pos_proj.kernel[...].astype(jnp.float32)  # [L, 3, H]

    def along(slope: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
        offset = jnp.arange(1 - size, size, dtype=jnp.float32)
        scores = slope[..., None] * offset + weights[:, 2, :, None] * offset**2
        share = jax.nn.softmax(scores, axis=-1)
        mean = jnp.sum(share * offset, axis=-1)
        return mean, jnp.sum(share * (offset - mean[..., None]) ** 2, axis=-1)

    rows, columns = model.grid
    mean_x, variance_x = along(weights[:, 0], columns)
    mean_y, variance_y = along(weights[:, 1], rows)
    return jnp.stack([mean_x, mean_y], axis=-1), jnp.sqrt((variance_x + variance_y) / 2)


def nonlocality(
    model: VisionTransformer, images: jax.Array, *, valid: jax.Array | None = None, as_logged: bool = False
) -> jax.Array:
    """Returns Eq. 8 for every block and head, float32 [blocks, heads].

    Args:
      model: in evaluation mode.
      images: float32 [B, H, W, 3], normalised.
      valid: bool [B], which images count; None counts all.
      as_logged: what the original logs: every block's attention gets the raw patch embedding instead of its input.
    """
    weights = jnp.ones(len(images)) if valid is None else valid.astype(jnp.float32)
    distance = _mean_distance(model.grid)
    if as_logged:
        raw = model.patch_embed(images.astype(model.dtype))
        each = jnp.stack([distance(block.attn, raw) for block in model.blocks])
    else:
        each = jnp.concatenate(model.map_attention(images, distance))
    return jnp.sum(weights[:, None] * each, axis=1) / jnp.sum(weights)


@functools.cache
def _mean_distance(grid: tuple[int, int]) -> Callable[[Any, jax.Array], jax.Array]:
    """The mean distance of a layer's attention as a function of the layer and its input, [B, H]."""
    distances = patch_distances(grid)

    def distance(attn: SelfAttention | GatedPositionalSelfAttention, x: jax.Array) -> jax.Array:
        maps = attn.attention_maps(x[:, -len(distances) :])  # without the class token, the softmax is over patches
        return jnp.sum(maps * distances, axis=(2, 3)) / len(distances)  # a sum has full precision on every device

    return distance


def patch_distances(grid: tuple[int, int]) -> np.ndarray:
    """Returns |delta_ij| between the patches of a grid (rows, columns), float32 [N, N]."""
    y, x = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    return np.hypot(y[:, None] - y, x[:, None] - x).astype(np.float32)
