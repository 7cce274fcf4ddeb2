"""Where each head looks, layer by layer.

For GPSA layers the two parts of A = (1 - s) content + s position (ConViT, section 3) and the gates
s = sigma(lambda) are given separately. Each layer gets its true input.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convit_jax.errors import UserError
from convit_jax.models.attention import GatedPositionalSelfAttention, SelfAttention
from convit_jax.models.variants import new_model
from convit_jax.models.vit import VisionTransformer


@dataclasses.dataclass(frozen=True)
class LayerMaps:
    """Attention in one layer for one image, float32 per head.

    The tokens are T class and distillation tokens (0 before they join, then 1 or 2) and the N patches, row by row.
    """

    content: np.ndarray  # [H, T + N, T + N]; in plain layers all of the attention
    gates: np.ndarray | None  # sigma(lambda), [H]; None in plain layers, like the next two
    rows: np.ndarray | None  # A_y, [H, rows, rows]; see models/attention.py
    columns: np.ndarray | None  # A_x, [H, columns, columns]

    @functools.cached_property
    def position(self) -> np.ndarray:
        """The position part of a GPSA layer, A_y (x) A_x, [H, N, N]."""
        assert self.rows is not None
        assert self.columns is not None
        return np.einsum("hyY,hxX->hyxYX", self.rows, self.columns).reshape(self.content.shape)

    @property
    def attention(self) -> np.ndarray:
        """From each token (second axis) to each, [H, T + N, T + N]; in GPSA layers the gated sum."""
        if self.gates is None:
            return self.content
        gates = self.gates[:, None, None]
        return (1 - gates) * self.content + gates * self.position


def layer_maps(model: VisionTransformer, image: jax.Array | np.ndarray) -> list[LayerMaps]:
    """Returns the attention maps of every layer, for an image float32 [H, W, C], normalised.

    The model must be in evaluation mode.
    """
    return [
        LayerMaps(**jax.tree.map(lambda values, number=number: values[number], stack))
        for stack in jax.device_get(model.map_attention(jnp.asarray(image)[None], _look))
        for number in range(len(stack["content"]))
    ]


def _look(attn: SelfAttention | GatedPositionalSelfAttention, x: jax.Array) -> dict[str, jax.Array | None]:
    if isinstance(attn, SelfAttention):
        return dict(content=attn.attention_maps(x)[0], gates=None, rows=None, columns=None)
    rows, columns = attn.positional_factors()
    return dict(content=attn.content_maps(x)[0], gates=attn.gates(), rows=rows, columns=columns)


def init_maps(
    settings: dict[str, Any], seed: int, query: tuple[int, int], image: jax.Array | np.ndarray | None = None
) -> tuple[np.ndarray | None, dict[float | None, np.ndarray]]:
    """Returns the attention of a patch in the first GPSA layer before training (Fig. 3).

    Args:
      settings, seed: of the model.
      query: (row, column) of the patch.
      image: float32 [H, W, C], normalised, or None.

    Returns:
      (content, position by locality strength), float32 [H, rows, columns] each. Content is None without an
      image. The strengths are half the model's, its own and twice it; with conv_init=False only None, the
      ordinary init. UserError without a GPSA layer.
    """
    if settings["local_up_to_layer"] == 0:
        raise UserError("this model has no GPSA layer, so nothing starts as a convolution: use a ConViT.")
    model = new_model(settings, seed)
    patch = query[0] * model.grid[1] + query[1]

    def over_grid(maps: np.ndarray | jax.Array) -> np.ndarray:
        return np.asarray(maps)[:, patch].reshape(-1, *model.grid)

    content = None if image is None else over_grid(layer_maps(model, image)[0].content)
    attn = model.blocks[0].attn
    assert isinstance(attn, GatedPositionalSelfAttention)
    kernel, alpha = attn.pos_proj.kernel[...], settings["locality_strength"]
    scales: dict[float | None, float] = {alpha / 2: 0.5, alpha: 1, 2 * alpha: 2} if settings["conv_init"] else {None: 1}
    positions = {}
    for strength, scale in scales.items():
        attn.pos_proj.kernel = nnx.Param(scale * kernel)
        positions[strength] = over_grid(attn.positional_probabilities())
    return content, positions
