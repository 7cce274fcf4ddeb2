"""Changes to trained weights that show what a network relies on (ConViT, Tables 5 and 6).

Each returns a nested dict of parameters with one leaf changed. Evaluate it like any other weights: with
nnx.merge(graphdef, params) or `python -m convit_jax.evaluate`.
"""

from typing import Any

import numpy as np

from convit_jax.errors import UserError


def mask_position_embedding(params: dict[str, Any]) -> dict[str, Any]:
    """Returns the parameters with the position embedding set to 0, also that of the tokens (Table 5)."""
    return {**params, "pos_embed": np.zeros_like(params["pos_embed"])}


def force_gates(params: dict[str, Any], to: str, layers: int | None = None) -> dict[str, Any]:
    """Returns the parameters with sigma(lambda) of the first GPSA layers exactly 1 or 0 (Table 6).

    Args:
      params: nested dict; gating_param of all GPSA layers is one leaf [layers, H].
      to: "position" (sigma = 1) or "content" (sigma = 0).
      layers: number of leading GPSA layers to change; None changes all.
    """
    if "gpsa_blocks" not in params:
        raise UserError("these weights have no GPSA layer, so there are no gates to force: use a ConViT.")
    blocks = params["gpsa_blocks"]
    gating = np.array(blocks["attn"]["gating_param"])
    count = len(gating) if layers is None else layers
    if not 1 <= count <= len(gating):
        raise UserError(f"gpsa_layers is {layers}, but the weights have {len(gating)} GPSA layers: use 1 to that many.")
    gating[:count] = np.inf if to == "position" else -np.inf  # any finite lambda gives sigma close to 1 or 0 only
    return {**params, "gpsa_blocks": {**blocks, "attn": {**blocks["attn"], "gating_param": gating}}}
