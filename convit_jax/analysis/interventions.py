"""Changes to trained weights that show what a network relies on (ConViT, Tables 5 and 6).

Each takes a nested dict of parameters and gives another with one leaf changed: the model stays what it is.
Evaluate the result as any weights: nnx.merge(graphdef, params), or `python -m convit_jax.evaluate`.
"""

import numpy as np

from convit_jax.errors import UserError

# lambda whose sigmoid is exactly 1 or 0, also in float32: of a large number it is only nearly so.
FORCED = {"position": np.inf, "content": -np.inf}


def mask_position_embedding(params):
    """The parameters with the position embedding 0, that of class and distillation token too (Table 5)."""
    return {**params, "pos_embed": np.zeros_like(params["pos_embed"])}


def force_gates(params, to, layers=None):
    """The parameters with sigma(lambda) of the first GPSA layers exactly 1 or 0 (Table 6).

    Args:
      params: nested dict; gating_param of all GPSA layers is one leaf [layers, H].
      to: "position" (sigma = 1) or "content" (sigma = 0).
      layers: how many of the first GPSA layers; None: all.

    Raises:
      UserError: the model has no GPSA layer, or not so many.
    """
    if "gpsa_blocks" not in params:
        raise UserError("these weights have no GPSA layer and so no gates to force: take those of a ConViT.")
    blocks = params["gpsa_blocks"]
    gating = np.array(blocks["attn"]["gating_param"])
    count = len(gating) if layers is None else layers
    if not 1 <= count <= len(gating):
        raise UserError(
            f"gpsa_layers is {layers}, but the weights have {len(gating)} GPSA layers: give 1 to "
            f"{len(gating)}."
        )
    gating[:count] = FORCED[to]
    return {**params, "gpsa_blocks": {**blocks, "attn": {**blocks["attn"], "gating_param": gating}}}
