"""Attention by cuDNN's fused kernel (FlashAttention), for bfloat16 on NVIDIA GPUs.

Everything is [B, N, H, d], as projections give it: nothing is transposed for the kernel. The position of
GPSA is one N x N map a head for all images, applied by a product over values laid out as [H, B, d, N]:
on a GPU two more transpositions cost more than the arithmetic that the two factors would save.
"""

import jax
import jax.extend
import jax.numpy as jnp

IMPLEMENTATION = "cudnn"  # of jax.nn.dot_product_attention


def available():
    """Whether the devices at hand are GPUs that have the kernel: NVIDIA's, from Ampere on."""
    if "cuda" not in jax.extend.backend.get_backend().platform_version.lower():
        return False
    return float(jax.local_devices()[0].compute_capability) >= 8.0


def keep(primitive, *_, **__):
    """A jax.checkpoint policy: keep what the kernel gave, so that the gradient does not run it again.

    By the name of JAX's primitive; a test says if it changes.
    """
    return primitive.name.startswith("dot_product_attention_fwd")


def attention(q, k, v):
    """softmax(q k / sqrt(d)) v, each [B, N, H, d]."""
    tokens, lengths = q.shape[1], None
    # JAX refuses the gradient of an odd number (check_is_flash_attention, which takes an empty bias for one).
    # The lengths are all the same, so that it does not matter that they are not cut with the batch.
    if tokens % 2:
        lengths = jnp.full(q.shape[0], tokens, jnp.int32)
        q, k, v = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in (q, k, v))
    out = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation=IMPLEMENTATION)
    return out[:, :tokens]


@jax.custom_vjp
def over_tokens(maps, v):
    """Maps float32 [H, N, N] times values [H, B, d, N] -> [H, B, d, N]; the maps' gradient is float32."""
    return jnp.einsum("hbdm,hnm->hbdn", v, maps.astype(v.dtype))


def _over_tokens_backward(kept, d_out):
    maps, v = kept
    d_maps = jnp.einsum("hbdn,hbdm->hnm", d_out, v, preferred_element_type=maps.dtype)
    return d_maps, jnp.einsum("hbdn,hnm->hbdm", d_out, maps.astype(v.dtype))


over_tokens.defvjp(lambda maps, v: (over_tokens(maps, v), (maps, v)), _over_tokens_backward)


def position(a_y, a_x, v):
    """(A_y (x) A_x) v of each head: [H, rows, rows], [H, columns, columns], v [B, N, H, d] -> as v."""
    tokens = v.shape[1]
    # Without the barrier XLA looks a minute longer for what to fuse with them, where blocks are unrolled.
    a_y, a_x = jax.lax.optimization_barrier((a_y, a_x))
    maps = jnp.einsum("hyv,hxu->hyxvu", a_y, a_x).reshape(-1, tokens, tokens)
    return over_tokens(maps, v.transpose(2, 0, 3, 1)).transpose(1, 3, 0, 2)
