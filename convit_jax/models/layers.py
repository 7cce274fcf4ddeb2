"""The parts of every block: linear layers, LayerNorm, GELU, dropout, stochastic depth, MLP, patch embedding.

Under bfloat16 the statistics of norms and the gradients of parameters (sums over all tokens) are float32.
"""

import functools
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from convit_jax.models.initializers import trunc_normal, uniform

Key = jax.Array | None  # PRNG key of dropout and stochastic depth in training, None in evaluation


@jax.custom_vjp
def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns x kernel, [..., E] in the dtype of x, of x [..., D] and a kernel float32 [D, E].

    The gradient of the kernel sums over all tokens, and over devices, in float32. It transposes the narrower of x
    and the cotangent, since a CPU copies what it transposes; JAX's own always transposes the cotangent.
    """
    return x @ kernel.astype(x.dtype)


def _matmul_backward(kept: Any, d_out: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    rows, d_rows = x.reshape(-1, x.shape[-1]), d_out.reshape(-1, d_out.shape[-1])
    wide = functools.partial(jnp.matmul, preferred_element_type=kernel.dtype)
    d_kernel = wide(rows.T, d_rows) if rows.shape[1] <= d_rows.shape[1] else wide(d_rows.T, rows).T
    return d_out @ kernel.astype(d_out.dtype).T, d_kernel


matmul.defvjp(lambda x, kernel: (matmul(x, kernel), (x, kernel)), _matmul_backward)


@jax.custom_vjp
def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """Returns x + bias, [..., E] in the dtype of x; the gradient of the float32 bias is a float32 sum."""
    return (x + bias).astype(x.dtype)


def _add_bias_backward(_: None, d_out: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Without the barrier XLA for a GPU also writes d_out in float32: 0.7 GB a block in the MLP of ConViT-S at
    # batch 512.
    d_out = jax.lax.optimization_barrier(d_out)
    return d_out, jnp.sum(d_out, axis=range(d_out.ndim - 1), dtype=jnp.float32)


add_bias.defvjp(lambda x, bias: (add_bias(x, bias), None), _add_bias_backward)


class Linear(nnx.Linear):
    """Dense layer [..., D] -> [..., E] with the original's init: N(0, 0.02), zero bias."""

    def __init__(self, dim_in: int, dim_out: int, *, use_bias: bool = True, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        super().__init__(dim_in, dim_out, use_bias=use_bias, dtype=dtype, kernel_init=trunc_normal, rngs=rngs)

    def __call__(self, x: jax.Array, columns: slice = slice(None)) -> jax.Array:
        """Returns the outputs in `columns`, by default all, in the dtype of the layer."""
        out = matmul(x.astype(self.dtype), self.kernel[:, columns])
        if self.bias is None:
            return out
        bias = self.bias[columns]
        return out + bias if out.dtype == bias.dtype else add_bias(out, bias)


def layer_norm(dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Returns a LayerNorm with eps 1e-6 and float32 statistics; its output has `dtype`."""
    return nnx.LayerNorm(dim, epsilon=1e-6, use_fast_variance=False, dtype=dtype, rngs=rngs)


def gelu(x: jax.Array) -> jax.Array:
    """Returns x Phi(x), exact, in float32 with erf as in PyTorch (faster than the erfc of jax.nn.gelu)."""
    x32 = x.astype(jnp.float32)
    return (0.5 * x32 * (1.0 + jax.lax.erf(x32 * math.sqrt(0.5)))).astype(x.dtype)


def split_key(key: Key, count: int) -> list[Key]:
    """Returns `count` keys from one, or `count` times None from None."""
    return [None] * count if key is None else list(jax.random.split(key, count))


def dropout(x: jax.Array, rate: float, key: Key) -> jax.Array:
    """Returns x with a fraction `rate` of its values zeroed and the rest scaled; x itself without a key."""
    if key is None or rate == 0.0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1.0 - rate, x.shape), x / (1.0 - rate), 0).astype(x.dtype)


def drop_path(x: jax.Array, rate: jax.Array | float | None, key: Key) -> jax.Array:
    """Returns the branch x [B, N, D] zeroed for a fraction `rate` of the examples (stochastic depth).

    The rest is scaled. Returns x itself without a key or rate. See Huang et al. 2016.
    """
    if key is None or rate is None:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, (x.shape[0], 1, 1))
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


class Mlp(nnx.Module):
    """fc2(gelu(fc1(x))): [B, N, D] -> [B, N, D]."""

    def __init__(self, dim: int, hidden_dim: int, *, drop: float = 0.0, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.drop = drop
        self.fc1 = Linear(dim, hidden_dim, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(hidden_dim, dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, *, key: Key = None) -> jax.Array:
        hidden_key, out_key = split_key(key, 2)
        hidden = checkpoint_name(self.fc1(x), "hidden")
        x = dropout(gelu(hidden), self.drop, hidden_key)
        return dropout(self.fc2(x), self.drop, out_key)


class PatchEmbed(nnx.Module):
    """Images [B, height, width, C] -> patches float32 [B, rows * columns, D], row by row.

    `proj` holds the parameters of the original's convolution, whose stride is its size. It is computed as one
    matrix product, since the gradient of the convolution is slow on a CPU.
    """

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        size = (patch_size, patch_size)
        init = uniform((patch_size * patch_size * in_chans) ** -0.5)
        inits: dict[str, Any] = dict(kernel_init=init, bias_init=init, rngs=rngs)
        self.proj = nnx.Conv(in_chans, embed_dim, size, strides=size, padding="VALID", dtype=dtype, **inits)

    def __call__(self, images: jax.Array) -> jax.Array:
        batch, height, width, channels = images.shape
        kernel, bias = self.proj.kernel, cast(nnx.Param, self.proj.bias)  # [size, size, C, D], [D]
        size, width_out = kernel.shape[0], kernel.shape[-1]
        patches = images.reshape(batch, height // size, size, width // size, size, channels)
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, size * size * channels)
        return matmul(patches, kernel[...].reshape(-1, width_out)) + bias[...]
