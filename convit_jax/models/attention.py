"""Gated positional self-attention (GPSA) and plain self-attention.

GPSA, head h (ConViT, section 3): A = (1 - s) softmax(q k / sqrt(d)) + s softmax(v_h . r),
s = sigmoid(gating_param), r = (dx, dy, dx^2 + dy^2) from query to key, in patches.
The positional score is a sum of a function of dx and one of dy, so its softmax over a
rows x columns grid is exactly A_y (x) A_x, two one-dimensional softmaxes that no image
changes. GPSA therefore costs what plain attention costs: a fused kernel for the content
and two small matrix products along the axes of the grid, never an N x N positional tensor
of each image.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from convit_jax.models import kernels
from convit_jax.models.layers import TRUNC_NORMAL, Linear, dropout, split_key


def content_probabilities(q, k):
    """softmax(q k / sqrt(d)) in float32: q [B, H, Q, d], k [B, H, N, d] -> [B, H, Q, N]."""
    return jax.nn.softmax(_scores(q, k), axis=-1)


def apply_maps(maps, v):
    """Attention maps [B, H, Q, N] times values [B, H, N, d] -> [B, H, Q, d], in the dtype of the values."""
    return jnp.einsum("bhqn,bhnd->bhqd", maps.astype(v.dtype), v)


def _scores(q, k):
    return jnp.einsum("bhqd,bhnd->bhqn", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[-1])


@jax.custom_vjp
def attention(q, k, v):
    """softmax(q k / sqrt(d)) v: q [B, H, Q, d], k and v [B, H, N, d] -> [B, H, Q, d].

    The rows are divided by their sums after the product, which is cheaper, and the gradient computes the
    probabilities P again from q and k (as FlashAttention does): nothing but the result is kept of the
    forward pass, so that it can be one kernel.
    """
    scores = _scores(q, k)
    exp = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    return (apply_maps(exp, v) / jnp.sum(exp, axis=-1, keepdims=True)).astype(v.dtype)


def _attention_forward(q, k, v):
    out = checkpoint_name(attention(q, k, v), "attention")
    return out, (q, k, v, out)


def _attention_backward(kept, d_out):
    """dS = P * (d_out v^T - rowsum(d_out * out)) / sqrt(d), and from it dq, dk; dv = P^T d_out."""
    q, k, v, out = kept
    maps = content_probabilities(q, k)
    d_v = jnp.einsum("bhqn,bhqd->bhnd", maps.astype(v.dtype), d_out)
    d_maps = jnp.einsum("bhqd,bhnd->bhqn", d_out, v, preferred_element_type=jnp.float32)
    inner = jnp.sum(d_out.astype(jnp.float32) * out, axis=-1, keepdims=True)
    d_scores = (maps * (d_maps - inner) / math.sqrt(q.shape[-1])).astype(q.dtype)
    d_q = jnp.einsum("bhqn,bhnd->bhqd", d_scores, k)
    d_k = jnp.einsum("bhqn,bhqd->bhnd", d_scores, q)
    return d_q, d_k, d_v


attention.defvjp(_attention_forward, _attention_backward)


def split_heads(x, count, num_heads):
    """[B, N, count * D] -> `count` arrays [B, H, N, d]: heads beside the batch, for batched products."""
    batch, tokens, width = x.shape
    x = x.reshape(batch, tokens, count, num_heads, width // (count * num_heads))
    return tuple(checkpoint_name(x.transpose(2, 0, 3, 1, 4), "qkv"))


def join_heads(x):
    """[B, H, N, d] -> [B, N, H * d]."""
    batch, heads, tokens, size = x.shape
    return x.transpose(0, 2, 1, 3).reshape(batch, tokens, heads * size)


def by_cudnn(setting):
    """Whether a layer's setting `attention` asks for cuDNN's kernel, and the devices at hand have it."""
    return setting == "cudnn" and kernels.available()


def parted_heads(linear, x, count, num_heads):
    """x [B, N, D] through a joint layer D -> count * D: `count` arrays [B, N, H, d], a product each.

    The parts of one product would be copied before a kernel that wants each in one piece.
    """
    batch, tokens, dim = x.shape
    parts = (linear(x, slice(i * dim, (i + 1) * dim)) for i in range(count))
    return [checkpoint_name(part, "qkv").reshape(batch, tokens, num_heads, -1) for part in parts]


def along_axes(a_y, a_x, v):
    """(A_y (x) A_x) v of each head: [H, rows, rows], [H, columns, columns], v [B, H, N, d] -> [B, H, N, d].

    The factors, float32, are repeated for the batch, so that the products are batched over leading axes and
    no value has to move; with heads alone as the batch the values would be transposed, and back. They take
    the dtype of v only then: their gradient, a sum over the batch, is one of float32.
    """
    batch, heads, tokens, size = v.shape
    rows, columns = a_y.shape[-1], a_x.shape[-1]
    a_y = jnp.broadcast_to(a_y, (batch, *a_y.shape)).astype(v.dtype)
    a_x = jnp.broadcast_to(a_x[:, None], (batch, heads, rows, columns, columns)).astype(v.dtype)
    v = a_y @ v.reshape(batch, heads, rows, columns * size)  # [B, H, rows, columns * d]
    return (a_x @ v.reshape(batch, heads, rows, columns, size)).reshape(batch, heads, tokens, size)


def mix(gate, content, position):
    """(1 - s) content + position (which has s in it already), summed in float32, in the dtype of content."""
    mixed = (1.0 - gate) * content.astype(jnp.float32) + position
    return checkpoint_name(mixed.astype(content.dtype), "mixed")


def local_positional_weights(num_heads, locality_strength):
    """v_h of the convolutional init (ConViT, section 3), float32 [3, k*k], k = int(sqrt(heads)).

    Head h1 + k*h2 looks at the pixel (h2 - c, h1 - c) from its query, c the centre of the k x k filter.
    Equals `local_init` of the original's convit.py, transposed.
    """
    k = math.isqrt(num_heads)
    centre = (k - 1) / 2 if k % 2 == 0 else k // 2
    offsets = jnp.arange(k, dtype=jnp.float32) - centre
    dx, dy = jnp.repeat(offsets, k), jnp.tile(offsets, k)
    return locality_strength * jnp.stack([2 * dx, 2 * dy, -jnp.ones(k * k)])


class SelfAttention(nnx.Module):
    """Multi-head self-attention of a plain ViT: [B, N, D] -> [B, N, D].

    attention: "xla", or "cudnn" for its fused kernel where there is an NVIDIA GPU.
    """

    def __init__(
        self,
        dim,
        num_heads,
        *,
        qkv_bias=False,
        attention="xla",
        attn_drop=0.0,
        proj_drop=0.0,
        dtype=jnp.float32,
        rngs,
    ):
        self.num_heads, self.attn_drop, self.proj_drop = num_heads, attn_drop, proj_drop
        self.attention = attention
        self.qkv = Linear(dim, 3 * dim, use_bias=qkv_bias, dtype=dtype, rngs=rngs)
        self.proj = Linear(dim, dim, dtype=dtype, rngs=rngs)

    def _qkv(self, x):
        return split_heads(self.qkv(x), 3, self.num_heads)  # [B, H, N, d] each

    def attention_maps(self, x):
        """Attention probabilities, float32 [B, H, N, N], of tokens x [B, N, D]."""
        q, k, _ = self._qkv(x)
        return content_probabilities(q, k)

    def __call__(self, x, *, queries=None, key=None):
        """Attend. key: PRNG key for dropout in training, None in evaluation.

        queries: give the result for so many of the first tokens only, [B, queries, D].
        """
        attn_key, proj_key = split_key(key, 2)
        explicit = attn_key is not None and self.attn_drop > 0
        if queries is None and not explicit and by_cudnn(self.attention):
            q, k, v = parted_heads(self.qkv, x, 3, self.num_heads)
            with jax.named_scope("content"):
                out = kernels.attention(q, k, v).reshape(x.shape)
            return dropout(self.proj(out), self.proj_drop, proj_key)
        q, k, v = self._qkv(x)
        q = q[:, :, :queries]
        if explicit:
            out = apply_maps(dropout(content_probabilities(q, k), self.attn_drop, attn_key), v)
            out = checkpoint_name(out, "attention")
        else:
            with jax.named_scope("content"):
                out = attention(q, k, v)
        return dropout(self.proj(join_heads(out)), self.proj_drop, proj_key)


class GatedPositionalSelfAttention(nnx.Module):
    """GPSA over the patches of a grid (rows, columns): [B, N, D] -> [B, N, D], N = rows * columns.

    conv_init: start as a convolution (local positional weights, identity values), else as any
    other layer. locality_strength: the paper's alpha. gate_init: gating_param of every head.
    attention: of the content, as in SelfAttention.
    """

    def __init__(
        self,
        dim,
        num_heads,
        grid,
        *,
        qkv_bias=False,
        conv_init=True,
        locality_strength=1.0,
        gate_init=1.0,
        attention="xla",
        attn_drop=0.0,
        proj_drop=0.0,
        dtype=jnp.float32,
        rngs,
    ):
        self.num_heads, self.grid, self.attn_drop, self.proj_drop = num_heads, grid, attn_drop, proj_drop
        self.attention = attention
        self.qk = Linear(dim, 2 * dim, use_bias=qkv_bias, dtype=dtype, rngs=rngs)
        self.v = Linear(dim, dim, use_bias=qkv_bias, dtype=dtype, rngs=rngs)
        self.proj = Linear(dim, dim, dtype=dtype, rngs=rngs)
        self.pos_proj = nnx.Linear(
            3, num_heads, kernel_init=TRUNC_NORMAL, precision=jax.lax.Precision.HIGHEST, rngs=rngs
        )
        self.gating_param = nnx.Param(jnp.full(num_heads, gate_init, jnp.float32))
        if conv_init:
            local = local_positional_weights(num_heads, locality_strength)
            kernel = (
                locality_strength * self.pos_proj.kernel[...]
            )  # of the heads beyond k*k, which stay random
            self.pos_proj.kernel = nnx.Param(kernel.at[:, : local.shape[1]].set(local))
            self.v.kernel = nnx.Param(jnp.eye(dim))

    def _qkv(self, x):
        q, k = split_heads(self.qk(x), 2, self.num_heads)
        return q, k, *split_heads(self.v(x), 1, self.num_heads)  # [B, H, N, d] each

    def gates(self):
        """sigma(lambda) of each head, the weight of position against content, float32 [H]."""
        return jax.nn.sigmoid(self.gating_param[...].astype(jnp.float32))

    def positional_factors(self):
        """(A_y [H, rows, rows], A_x [H, columns, columns]), float32, with A_pos = A_y (x) A_x."""
        weights = self.pos_proj.kernel[...].astype(jnp.float32)  # [3, H]

        def axis_softmax(slope, size):
            delta = jnp.arange(size)[None, :] - jnp.arange(size)[:, None]  # key - query
            return jax.nn.softmax(
                slope[:, None, None] * delta + weights[2][:, None, None] * delta**2, axis=-1
            )

        return axis_softmax(weights[1], self.grid[0]), axis_softmax(weights[0], self.grid[1])

    def positional_probabilities(self):
        """softmax_j(v_h . r_ij) by its definition, over the whole grid: float32 [H, N, N]."""
        rows, columns = self.grid
        y, x = jnp.divmod(jnp.arange(rows * columns), columns)
        dy, dx = y[None, :] - y[:, None], x[None, :] - x[:, None]
        relative = jnp.stack([dx, dy, dx**2 + dy**2], axis=-1).astype(jnp.float32)
        return jax.nn.softmax(self.pos_proj(relative).transpose(2, 0, 1), axis=-1)

    def content_maps(self, x):
        """softmax_j(q_i . k_j / sqrt(d)), the content's part before the gate, float32 [B, H, N, N]."""
        q, k, _ = self._qkv(x)
        return content_probabilities(q, k)

    def attention_maps(self, x):
        """The paper's A in its explicit form, float32 [B, H, N, N], of patches x [B, N, D]."""
        q, k, _ = self._qkv(x)
        return self._maps(q, k)

    def _maps(self, q, k):
        gate = self.gates()[:, None, None]
        return (1.0 - gate) * content_probabilities(q, k) + gate * self.positional_probabilities()

    def __call__(self, x, *, key=None):
        """Attend. key: PRNG key for dropout in training, None in evaluation."""
        attn_key, proj_key = split_key(key, 2)
        if attn_key is not None and self.attn_drop > 0:
            q, k, v = self._qkv(x)
            out = apply_maps(dropout(self._maps(q, k), self.attn_drop, attn_key), v)
            out = join_heads(checkpoint_name(out, "attention"))
        elif by_cudnn(self.attention):
            out = self._fused(x)
        else:
            out = join_heads(self._separable(*self._qkv(x)))
        return dropout(self.proj(out), self.proj_drop, proj_key)

    def _fused(self, x):
        """As _separable, by cuDNN and from tokens [B, N, D] to heads side by side, [B, N, D]."""
        q, k = parted_heads(self.qk, x, 2, self.num_heads)
        (v,) = parted_heads(self.v, x, 1, self.num_heads)
        gate = self.gates()[:, None, None]
        with jax.named_scope("position"):
            a_y, a_x = self.positional_factors()
            position = kernels.position(gate * a_y, a_x, v)
        with jax.named_scope("content"):
            content = kernels.attention(q, k, v)
        return mix(gate[:, 0], content, position).reshape(x.shape)

    def _separable(self, q, k, v):
        """(1 - s) attention(q, k) v + s (A_y (x) A_x) v, [B, H, N, d]."""
        gate = self.gates()[:, None, None]
        with jax.named_scope("position"):
            a_y, a_x = self.positional_factors()
            position = along_axes(gate * a_y, a_x, v)
        with jax.named_scope("content"):
            content = attention(q, k, v)
        return mix(gate, content, position)
