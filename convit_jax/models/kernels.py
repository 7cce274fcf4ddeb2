"""How attention is computed: back ends, gradients, and what a block keeps for its gradient.

`attention.py` defines the layers. The two back ends, for any device and for NVIDIA GPUs, compute the same up to
rounding.

B: images, N: tokens, H: heads, d: channels of a head, D = H * d.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.extend
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from convit_jax.models.layers import Linear

# What a block keeps for its gradient besides its input: the results of matrix products, except the scores of
# attention. Norms, GELU, softmax and the positional term (part of "mixed") are cheap and computed again.
KEEP_PRODUCTS: Callable[..., Any] = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.save_only_these_names(
        "qkv",  # queries, keys, values
        "attention",  # maps times values
        "mixed",  # content plus position
        "middle",  # tokens between attention and MLP
        "hidden",  # fc1 of the MLP
    ),
    lambda primitive, *_, **__: primitive.name.startswith("dot_product_attention_fwd"),  # cuDNN's, never run again
)


def scaled_scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """Returns q k / sqrt(d), float32 [B, H, Q, N], of q [B, H, Q, d] and k [B, H, N, d]."""
    scores = jnp.einsum("bhqd,bhnd->bhqn", q, k, preferred_element_type=jnp.float32)
    return scores / math.sqrt(q.shape[-1])


@jax.custom_vjp
def softmax_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Returns softmax(q k / sqrt(d)) v, [B, H, Q, d], of q [B, H, Q, d], k and v [B, H, N, d], in the dtype of v.

    Rows are divided by their sums after the product with v, which is cheaper. The gradient computes the
    probabilities again from q and k, as FlashAttention does: no attention map is kept.
    """
    scores = scaled_scores(q, k)
    exp = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    out = jnp.einsum("bhqn,bhnd->bhqd", exp.astype(v.dtype), v)
    return (out / jnp.sum(exp, axis=-1, keepdims=True)).astype(v.dtype)


def _softmax_attention_forward(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
    out = checkpoint_name(softmax_attention(q, k, v), "attention")
    return out, (q, k, v, out)


def _softmax_attention_backward(kept: Any, d_out: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dS = P * (d_out v^T - rowsum(d_out * out)) / sqrt(d), from which dq and dk; dv = P^T d_out."""
    q, k, v, out = kept
    maps = jax.nn.softmax(scaled_scores(q, k), axis=-1)
    d_v = jnp.einsum("bhqn,bhqd->bhnd", maps.astype(v.dtype), d_out)
    d_maps = jnp.einsum("bhqd,bhnd->bhqn", d_out, v, preferred_element_type=jnp.float32)
    inner = jnp.sum(d_out.astype(jnp.float32) * out, axis=-1, keepdims=True)
    d_scores = (maps * (d_maps - inner) / math.sqrt(q.shape[-1])).astype(q.dtype)
    d_q = jnp.einsum("bhqn,bhnd->bhqd", d_scores, k)
    d_k = jnp.einsum("bhqn,bhqd->bhnd", d_scores, q)
    return d_q, d_k, d_v


softmax_attention.defvjp(_softmax_attention_forward, _softmax_attention_backward)


class XlaBackend:
    """Products that XLA compiles. Heads are next to the batch, [B, H, N, d]: products are batched over leading axes."""

    per_head = (-1, 1, 1)  # shape that aligns one number per head with [B, H, N, d]

    @staticmethod
    def split_heads(linear: Linear, x: jax.Array, count: int, num_heads: int) -> tuple[jax.Array, ...]:
        """Returns `count` arrays [B, H, N, d] of tokens x [B, N, D] through a layer D -> count * D."""
        x = linear(x)
        batch, tokens, width = x.shape
        x = x.reshape(batch, tokens, count, num_heads, width // (count * num_heads))
        return tuple(checkpoint_name(x.transpose(2, 0, 3, 1, 4), "qkv"))

    @staticmethod
    def join_heads(x: jax.Array) -> jax.Array:
        """Returns [B, N, D] of heads [B, H, N, d]."""
        batch, heads, tokens, size = x.shape
        return x.transpose(0, 2, 1, 3).reshape(batch, tokens, heads * size)

    @staticmethod
    def content(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """Returns softmax(q k / sqrt(d)) v, [B, H, Q, d]."""
        with jax.named_scope("content"):
            return softmax_attention(q, k, v)

    @staticmethod
    def apply_maps(maps: jax.Array, v: jax.Array) -> jax.Array:
        """Returns explicit attention maps [B, H, Q, N] times values, [B, H, Q, d]."""
        return checkpoint_name(jnp.einsum("bhqn,bhnd->bhqd", maps.astype(v.dtype), v), "attention")

    @staticmethod
    def position(a_y: jax.Array, a_x: jax.Array, v: jax.Array) -> jax.Array:
        """Returns (A_y (x) A_x) v, [B, H, N, d], of a_y [H, rows, rows], a_x [H, columns, columns], v [B, H, N, d].

        One product along each axis of the grid. The factors, float32, are repeated for the batch: with the heads
        alone as batch axis XLA would transpose the values. They take the dtype of v after that, so that their
        gradient is summed in float32.
        """
        with jax.named_scope("position"):
            batch, heads, tokens, size = v.shape
            rows, columns = a_y.shape[-1], a_x.shape[-1]
            a_y = jnp.broadcast_to(a_y, (batch, *a_y.shape)).astype(v.dtype)
            a_x = jnp.broadcast_to(a_x[:, None], (batch, heads, rows, columns, columns)).astype(v.dtype)
            v = a_y @ v.reshape(batch, heads, rows, columns * size)  # [B, H, rows, columns * d]
            return (a_x @ v.reshape(batch, heads, rows, columns, size)).reshape(batch, heads, tokens, size)


class CudnnBackend:
    """cuDNN's fused kernel (FlashAttention), for bfloat16; see `XlaBackend` for the methods.

    Heads are next to the channels, [B, N, H, d], as projections give them: nothing is transposed for the kernel.
    """

    per_head = (-1, 1)
    implementation: Literal["cudnn", "xla"] = "cudnn"  # of jax.nn.dot_product_attention

    @staticmethod
    def split_heads(linear: Linear, x: jax.Array, count: int, num_heads: int) -> tuple[jax.Array, ...]:
        """Returns `count` arrays [B, N, H, d], by one product each.

        The parts of a joint product would be copied for the kernel, which takes contiguous arrays.
        """
        batch, tokens, dim = x.shape
        parts = (linear(x, slice(i * dim, (i + 1) * dim)) for i in range(count))
        return tuple(checkpoint_name(part, "qkv").reshape(batch, tokens, num_heads, dim // num_heads) for part in parts)

    @staticmethod
    def join_heads(x: jax.Array) -> jax.Array:
        """Returns [B, N, D] of heads [B, N, H, d]."""
        return x.reshape(*x.shape[:2], -1)

    @classmethod
    def content(cls, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """Returns softmax(q k / sqrt(d)) v, [B, N, H, d]."""
        tokens, lengths = q.shape[1], None
        # JAX refuses the gradient for an odd number of tokens (check_is_flash_attention takes the empty bias
        # for a bias): pad, and give the true lengths.
        if tokens % 2:
            lengths = jnp.full(q.shape[0], tokens, jnp.int32)
            q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
        with jax.named_scope("content"):
            out = jax.nn.dot_product_attention(
                q, k, v, key_value_seq_lengths=lengths, implementation=cls.implementation
            )
        return out[:, :tokens]

    @staticmethod
    def position(a_y: jax.Array, a_x: jax.Array, v: jax.Array) -> jax.Array:
        """Returns (A_y (x) A_x) v, [B, N, H, d], by one N x N map per head for all images.

        On a GPU the transpositions between products along the axes cost more than the arithmetic they save.
        """
        with jax.named_scope("position"):
            tokens = v.shape[1]
            # Without the barrier XLA takes a minute longer to compile unrolled blocks, in search of fusions.
            a_y, a_x = jax.lax.optimization_barrier((a_y, a_x))
            maps = jnp.einsum("hyv,hxu->hyxvu", a_y, a_x).reshape(-1, tokens, tokens)
            return _shared_maps_times_values(maps, v.transpose(2, 0, 3, 1)).transpose(1, 3, 0, 2)


@jax.custom_vjp
def _shared_maps_times_values(maps: jax.Array, v: jax.Array) -> jax.Array:
    """Maps float32 [H, N, N] times values [H, B, d, N] -> [H, B, d, N]; the maps' gradient is float32."""
    return jnp.einsum("hbdm,hnm->hbdn", v, maps.astype(v.dtype))


def _shared_maps_backward(kept: Any, d_out: jax.Array) -> tuple[jax.Array, jax.Array]:
    maps, v = kept
    d_maps = jnp.einsum("hbdn,hbdm->hnm", d_out, v, preferred_element_type=maps.dtype)
    return d_maps, jnp.einsum("hbdn,hnm->hbdm", d_out, maps.astype(v.dtype))


_shared_maps_times_values.defvjp(lambda maps, v: (_shared_maps_times_values(maps, v), (maps, v)), _shared_maps_backward)


def choose_backend(attention: str) -> type[XlaBackend] | type[CudnnBackend]:
    """Returns the back end of a layer's setting `attention`, "xla" or "cudnn"; XLA where cuDNN is not available."""
    return CudnnBackend if attention == "cudnn" and cudnn_available() else XlaBackend


def cudnn_available() -> bool:
    """Returns whether the local devices are NVIDIA GPUs with cuDNN's fused attention (Ampere or later)."""
    if "cuda" not in jax.extend.backend.get_backend().platform_version.lower():
        return False
    return float(jax.local_devices()[0].compute_capability) >= 8.0
