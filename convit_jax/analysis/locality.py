"""What the attention of a model looks at: centres and spans of its positional term, non-locality.

Non-locality (ConViT, Eq. 8) is the distance from query to key, in patches, averaged with the attention:
    D_h = (1 / N) sum_ij A_hij |delta_ij|, mean over images.
It is that of the attention among patches: where the class token takes part, the attention of the patches to
each other, made to sum to 1 again (as if the token were not there), so that uniform attention means the same
in every block. On a 14 x 14 grid that is 7.281.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def centres_and_spans(model):
    """Where the positional attention of a model with GPSA looks, and how widely, in patches.

    Mean and standard deviation of the offset (dx, dy) under softmax(v_h . r) over all offsets that occur in
    the grid. Where the Gaussian that v = (w1, w2, w3) describes fits into it, these are its maximum
    (-w1, -w2) / (2 w3) and its width 1 / sqrt(-2 w3); unlike them they exist for w3 >= 0 too.

    Returns:
      (centres float32 [GPSA blocks, heads, 2], spans float32 [GPSA blocks, heads]); a span is the root of
      the mean of the variances along x and along y.
    """
    weights = model.gpsa_blocks.attn.pos_proj.kernel[...].astype(jnp.float32)  # [L, 3, H]

    def along(slope, size):
        offset = jnp.arange(1 - size, size, dtype=jnp.float32)
        scores = slope[..., None] * offset + weights[:, 2, :, None] * offset**2
        share = jax.nn.softmax(scores, axis=-1)
        mean = jnp.sum(share * offset, axis=-1)
        return mean, jnp.sum(share * (offset - mean[..., None]) ** 2, axis=-1)

    rows, columns = model.grid
    mean_x, variance_x = along(weights[:, 0], columns)
    mean_y, variance_y = along(weights[:, 1], rows)
    return jnp.stack([mean_x, mean_y], axis=-1), jnp.sqrt((variance_x + variance_y) / 2)


def nonlocality(model, images, *, valid=None, as_logged=False):
    """Eq. 8 of every block and head, float32 [blocks, heads].

    Args:
      images: float32 [B, H, W, 3], normalised. valid: bool [B], which of them count; by default all.
      as_logged: what the original writes into its log: every block's attention gets the raw patch embedding,
        without position, norm, the blocks before it and class token, instead of its true input.
    """
    patches = model.grid[0] * model.grid[1]
    distances = patch_distances(model.grid)
    weights = jnp.ones(len(images)) if valid is None else valid.astype(jnp.float32)
    weights = weights / jnp.sum(weights)

    def distance(attn, x):
        # Queries and keys come of one token each: without the class token, the softmax is over patches alone.
        maps = attn.attention_maps(x[:, -patches:])
        # [B, H]; a sum and no matrix product, for full precision on every device
        each = jnp.sum(maps * distances, axis=(2, 3)) / patches
        return jnp.sum(weights[:, None] * each, axis=0)

    if as_logged:
        raw = model.patch_embed(images.astype(model.dtype))

        def of_stack(stack):
            graphdef, params = nnx.split(stack.attn)
            return jax.lax.map(lambda params: distance(nnx.merge(graphdef, params), raw), params)

        found = [of_stack(stack) for stack in (model.gpsa_blocks, model.sa_blocks) if stack is not None]
    else:
        found = model.map_attention(images, distance)
    return jnp.concatenate(found)


def patch_distances(grid):
    """|delta_ij| between the patches of a grid (rows, columns), float32 [N, N]."""
    y, x = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    return np.hypot(y[:, None] - y, x[:, None] - x).astype(np.float32)
