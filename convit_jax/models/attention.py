"""Self-attention and gated positional self-attention (GPSA), section 3 of the ConViT paper.

For one head, with queries q, keys k and values v of d channels, the paper defines

    content   C_ij = softmax_j(q_i . k_j / sqrt(d))
    position  P_ij = softmax_j(v_h . r_ij),   r_ij = (dx, dy, dx^2 + dy^2) from i to j, in patches
    GPSA      A    = (1 - s) C + s P,         s = sigmoid(lambda_h), the gate of the head
              out  = A v

with v_h = (w1, w2, w3) and lambda_h learned. The rows of A sum to 1 already: the paper's normalisation is not
needed.

P is separable. The positional score is w1 dx + w3 dx^2, which depends on dx only, plus w2 dy + w3 dy^2, which
depends on dy only. Its softmax over a rows x columns grid is therefore an outer product of two softmaxes,

    P = A_y (x) A_x,   A_y = softmax(w2 dy + w3 dy^2),   A_x = softmax(w1 dx + w3 dx^2)

for any weights and any image, and GPSA costs what plain attention costs:

    out = (1 - s) C v + s (A_y (x) A_x) v

C v is ordinary attention, for which `kernels.py` has fast forms, and A_y and A_x are applied along the axes
of the grid. No N x N positional tensor exists for any image.

Shapes: B images, N tokens, H heads, d channels of a head, D = H * d.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from convit_jax.models.initializers import trunc_normal
from convit_jax.models.kernels import XlaBackend, choose_backend, scaled_scores
from convit_jax.models.layers import Key, Linear, dropout, split_key


def content_probabilities(q: jax.Array, k: jax.Array) -> jax.Array:
    """Returns C = softmax(q k / sqrt(d)), float32 [B, H, Q, N], of q [B, H, Q, d] and k [B, H, N, d]."""
    return jax.nn.softmax(scaled_scores(q, k), axis=-1)


def local_positional_weights(num_heads: int, locality_strength: float) -> jax.Array:
    """Returns v_h of the convolutional init (section 3), float32 [3, k * k] with k = int(sqrt(num_heads)).

    v_h = strength * (2 dx, 2 dy, -1) gives a Gaussian around the key at (dx, dy) from the query. As in the
    original's `local_init`, head h1 + k * h2 takes pixel (h2 - c, h1 - c) of a k x k filter with centre c. Heads
    beyond k * k have no pixel. A larger strength, the paper's alpha, concentrates attention on the pixel.
    """
    k = math.isqrt(num_heads)
    centre = (k - 1) / 2
    offsets = jnp.arange(k, dtype=jnp.float32) - centre
    dx, dy = jnp.repeat(offsets, k), jnp.tile(offsets, k)
    return locality_strength * jnp.stack([2 * dx, 2 * dy, -jnp.ones(k * k)])


class GatedPositionalSelfAttention(nnx.Module):
    """GPSA over the patches of a grid: [B, N, D] -> [B, N, D], N = rows * columns.

    Args:
      dim: D, channels of a token.
      num_heads: H, divides `dim`.
      grid: (rows, columns) of patches.
      qkv_bias: whether queries, keys and values have biases.
      conv_init: start as a convolution (local positional weights, identity values), otherwise at random.
      locality_strength: the paper's alpha, see `local_positional_weights`.
      gate_init: initial lambda of every head; 1 gives s = 0.731.
      attention: back end of the content, "xla" or "cudnn".
      attn_drop: dropout rate of the attention maps. If above 0, training computes A explicitly.
      proj_drop: dropout rate of the output.
      dtype: of the arithmetic. Parameters, softmax and gates are float32.
      rngs: source of keys for the initial parameters.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        *,
        qkv_bias: bool = False,
        conv_init: bool = True,
        locality_strength: float = 1.0,
        gate_init: float = 1.0,
        attention: str = "xla",
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.num_heads, self.grid, self.attention = num_heads, grid, attention
        self.attn_drop, self.proj_drop = attn_drop, proj_drop
        self.qk = Linear(dim, 2 * dim, use_bias=qkv_bias, dtype=dtype, rngs=rngs)
        self.v = Linear(dim, dim, use_bias=qkv_bias, dtype=dtype, rngs=rngs)
        self.proj = Linear(dim, dim, dtype=dtype, rngs=rngs)
        precision = jax.lax.Precision.HIGHEST  # TF32 would round scores: dx^2 + dy^2 reaches hundreds
        self.pos_proj = nnx.Linear(3, num_heads, kernel_init=trunc_normal, precision=precision, rngs=rngs)
        self.gating_param = nnx.Param(jnp.full(num_heads, gate_init, jnp.float32))
        if conv_init:
            local = local_positional_weights(num_heads, locality_strength)
            random = locality_strength * self.pos_proj.kernel[...]  # of heads without a pixel
            self.pos_proj.kernel = nnx.Param(random.at[:, : local.shape[1]].set(local))
            self.v.kernel = nnx.Param(jnp.eye(dim))

    def gates(self) -> jax.Array:
        """Returns s = sigmoid(lambda) of each head, the weight of position against content, float32 [H]."""
        return jax.nn.sigmoid(self.gating_param[...].astype(jnp.float32))

    def positional_probabilities(self) -> jax.Array:
        """Returns P = softmax_j(v_h . r_ij) by its definition, float32 [H, N, N]."""
        rows, columns = self.grid
        y, x = jnp.divmod(jnp.arange(rows * columns), columns)
        dy, dx = y[None, :] - y[:, None], x[None, :] - x[:, None]
        relative = jnp.stack([dx, dy, dx**2 + dy**2], axis=-1).astype(jnp.float32)
        return jax.nn.softmax(self.pos_proj(relative).transpose(2, 0, 1), axis=-1)

    def positional_factors(self) -> tuple[jax.Array, jax.Array]:
        """Returns (A_y [H, rows, rows], A_x [H, columns, columns]), float32, with P = A_y (x) A_x."""
        # The bias of pos_proj is equal for all keys of a head, so softmax cancels it.
        w1, w2, w3 = self.pos_proj.kernel[...].astype(jnp.float32)[:, :, None, None]  # [H, 1, 1] each
        dy, dx = (jnp.arange(size)[None, :] - jnp.arange(size)[:, None] for size in self.grid)  # key - query
        return jax.nn.softmax(w2 * dy + w3 * dy**2), jax.nn.softmax(w1 * dx + w3 * dx**2)

    def content_maps(self, x: jax.Array) -> jax.Array:
        """Returns C, before the gate, float32 [B, H, N, N], of patches x [B, N, D]."""
        q, k = XlaBackend.split_heads(self.qk, x, 2, self.num_heads)
        return content_probabilities(q, k)

    def attention_maps(self, x: jax.Array) -> jax.Array:
        """Returns the paper's A in its explicit form, float32 [B, H, N, N], of patches x [B, N, D]."""
        gates = self.gates()[:, None, None]
        return (1.0 - gates) * self.content_maps(x) + gates * self.positional_probabilities()

    def __call__(self, x: jax.Array, *, key: Key = None) -> jax.Array:
        """Returns [B, N, D] of patches x [B, N, D] in row-major order."""
        attn_key, proj_key = split_key(key, 2)
        if attn_key is not None and self.attn_drop > 0:  # dropout(A) v, for which A must exist
            maps = dropout(self.attention_maps(x), self.attn_drop, attn_key)
            (v,) = XlaBackend.split_heads(self.v, x, 1, self.num_heads)
            out = XlaBackend.join_heads(XlaBackend.apply_maps(maps, v))
        else:
            out = self._separable(x)
        return dropout(self.proj(out), self.proj_drop, proj_key)

    def _separable(self, x: jax.Array) -> jax.Array:
        """(1 - s) C v + s (A_y (x) A_x) v."""
        backend = choose_backend(self.attention)
        q, k = backend.split_heads(self.qk, x, 2, self.num_heads)
        (v,) = backend.split_heads(self.v, x, 1, self.num_heads)
        gates = self.gates()[:, None, None]
        a_y, a_x = self.positional_factors()
        # s goes into A_y, the small factor, instead of the [B, H, N, d] result.
        gated_position = backend.position(gates * a_y, a_x, v)
        content = backend.content(q, k, v)
        mixed = (1.0 - gates.reshape(backend.per_head)) * content.astype(jnp.float32) + gated_position
        return backend.join_heads(checkpoint_name(mixed.astype(content.dtype), "mixed"))


class SelfAttention(nnx.Module):
    """Multi-head self-attention of a plain ViT, out = C v: [B, N, D] -> [B, N, D]. Args as for GPSA."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = False,
        attention: str = "xla",
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.num_heads, self.attention = num_heads, attention
        self.attn_drop, self.proj_drop = attn_drop, proj_drop
        self.qkv = Linear(dim, 3 * dim, use_bias=qkv_bias, dtype=dtype, rngs=rngs)
        self.proj = Linear(dim, dim, dtype=dtype, rngs=rngs)

    def attention_maps(self, x: jax.Array) -> jax.Array:
        """Returns C, float32 [B, H, N, N], of tokens x [B, N, D]."""
        q, k, _ = XlaBackend.split_heads(self.qkv, x, 3, self.num_heads)
        return content_probabilities(q, k)

    def __call__(self, x: jax.Array, *, queries: int | None = None, key: Key = None) -> jax.Array:
        """Returns [B, N, D] of tokens x [B, N, D]; with `queries` only of that many leading tokens."""
        attn_key, proj_key = split_key(key, 2)
        explicit = attn_key is not None and self.attn_drop > 0
        # A fused kernel saves nothing for the one or two queries of the last block.
        backend = choose_backend(self.attention) if queries is None and not explicit else XlaBackend
        q, k, v = backend.split_heads(self.qkv, x, 3, self.num_heads)
        if queries is not None:
            q = q[:, :, :queries]
        if explicit:
            out = XlaBackend.apply_maps(dropout(content_probabilities(q, k), self.attn_drop, attn_key), v)
        else:
            out = backend.content(q, k, v)
        return dropout(self.proj(backend.join_heads(out)), self.proj_drop, proj_key)
