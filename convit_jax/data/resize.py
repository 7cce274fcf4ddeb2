"""Pillow's bicubic resize inside jit: two products with matrices of weights, each rounded to uint8."""

import jax
import jax.numpy as jnp


def shown_images(batch: dict[str, jax.Array], size: tuple[int, int]) -> jax.Array:
    """Returns the images of a batch, uint8 [B, *size, 3]: its "image", or the views of its canvases (canvas.py)."""
    if "image" in batch:
        return batch["image"]
    canvas, view = batch["canvas"], batch["view"]
    groups, _, side = canvas.shape[:3]
    pick = jax.vmap(lambda canvases, on: canvases.at[on].get(mode="promise_in_bounds"))  # each device its own
    pixels = pick(canvas, batch["on"].reshape(groups, -1)).reshape(-1, side, side, 3)
    lost = view[..., 1] - view[..., 2]  # [B, 2] rows and columns that resizing takes away
    rows_first = (lost[:, 0] > 0) & (lost[:, 0] > 2 * lost[:, 1])  # the order of Pillow's passes since version 13

    def in_order(images: jax.Array) -> jax.Array:
        """Transposes the images of which the columns come first, so that a first pass is always along axis 1."""
        return jnp.where(rows_first[:, None, None, None], images, images.swapaxes(1, 2))

    pixels = in_order(pixels)
    axes = jnp.where(rows_first[:, None, None], view, view[:, ::-1])
    for number in range(2):
        pixels = _one_pass(pixels, _weights(axes[:, number], max(size), side))
    return in_order(pixels)[:, : size[0], : size[1]]


def _weights(axes: jax.Array, outputs: int, inputs: int) -> jax.Array:
    """The weights of Pillow's antialiased cubic (a = -0.5) for axes [B, 4], float32 [B, outputs, inputs]."""
    start, length, resized, first = (column[:, None, None] for column in axes.T)
    output = first + jnp.arange(outputs)[:, None]
    pixel = jnp.arange(inputs) - start
    # The distance of the centres (output + 1/2) length / resized and pixel + 1/2, divided by max(length / resized, 1).
    x = jnp.abs((2 * output + 1) * length - (2 * pixel + 1) * resized) / (2 * jnp.maximum(length, resized))
    cubic = jnp.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2)
    weights = jnp.where((x < 2) & (pixel >= 0) & (pixel < length), cubic, 0.0)
    return weights / jnp.sum(weights, axis=-1, keepdims=True)


def _one_pass(pixels: jax.Array, weights: jax.Array) -> jax.Array:
    """Filters images uint8 [B, K, L, 3] along axis 1 with weights [B, N, K]; returns them transposed, [B, L, N, 3].

    bfloat16 holds uint8 exactly, and in two parts a weight to 17 bits, so fast products give Pillow's sums.
    """
    high = jax.lax.reduce_precision(weights, 8, 7)  # XLA would drop a conversion to bfloat16 and back
    sums = jnp.float32(0.5)
    for part in (high, weights - high):
        operands = part.astype(jnp.bfloat16), pixels.astype(jnp.bfloat16)
        sums += jnp.einsum("bnk,bklc->blnc", *operands, preferred_element_type=jnp.float32)
    return jnp.clip(jnp.floor(sums), 0, 255).astype(jnp.uint8)
