"""What every block is made of: linear layers, LayerNorm, GELU, dropout and stochastic depth.

Under bfloat16 the statistics of norms and the gradients of parameters, sums over all tokens, are float32.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

TRUNC_NORMAL = nnx.initializers.normal(0.02)  # the original cuts at +-2, which is 100 sigma


@jax.custom_vjp
def product(x, kernel):
    """x [..., D] times kernel float32 [D, E] -> [..., E], in the dtype of x.

    The gradient for the kernel, a sum over all tokens, is one of float32, and is summed over devices as such.
    It transposes the narrower of x and the cotangent, since a CPU copies what it transposes; JAX's own always
    takes the cotangent.
    """
    return x @ kernel.astype(x.dtype)


def _product_forward(x, kernel):
    return product(x, kernel), (x, kernel)


def _product_backward(kept, d_out):
    x, kernel = kept
    rows, d_rows = x.reshape(-1, x.shape[-1]), d_out.reshape(-1, d_out.shape[-1])
    wide = functools.partial(jnp.matmul, preferred_element_type=kernel.dtype)
    d_kernel = wide(rows.T, d_rows) if rows.shape[1] <= d_rows.shape[1] else wide(d_rows.T, rows).T
    return d_out @ kernel.astype(d_out.dtype).T, d_kernel


product.defvjp(_product_forward, _product_backward)


@jax.custom_vjp
def add_bias(x, bias):
    """x [..., E] plus bias float32 [E], in the dtype of x; the bias's gradient is a sum in float32.

    What that sums is in the dtype of x, behind a barrier: XLA for a GPU would write it in float32 beside it
    (of ConViT-S's MLP 0.7 GB a block at batch 512).
    """
    return (x + bias).astype(x.dtype)


def _add_bias_backward(_, d_out):
    d_out = jax.lax.optimization_barrier(d_out)
    return d_out, jnp.sum(d_out, axis=range(d_out.ndim - 1), dtype=jnp.float32)


add_bias.defvjp(lambda x, bias: (add_bias(x, bias), None), _add_bias_backward)


class Linear(nnx.Linear):
    """Dense layer [..., D] -> [..., E] with the init of the original: N(0, 0.02), zero bias."""

    def __init__(self, dim_in, dim_out, *, use_bias=True, dtype, rngs):
        super().__init__(dim_in, dim_out, use_bias=use_bias, dtype=dtype, kernel_init=TRUNC_NORMAL, rngs=rngs)

    def __call__(self, x, columns=slice(None)):
        """columns: a slice of the outputs, for these alone."""
        out = product(x.astype(self.dtype), self.kernel[:, columns])
        if self.bias is None:
            return out
        bias = self.bias[columns]
        return out + bias if out.dtype == bias.dtype else add_bias(out, bias)


def dropout(x, rate, key):
    """Inverted dropout; no key (evaluation) or rate 0 returns x itself."""
    if key is None or rate == 0.0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1.0 - rate, x.shape), x / (1.0 - rate), 0).astype(x.dtype)


def split_key(key, count):
    """`count` keys from one, or as many None."""
    return [None] * count if key is None else list(jax.random.split(key, count))


def gelu(x):
    """x Phi(x), exact, in float32: by erf as PyTorch has it, faster than the erfc of jax.nn.gelu."""
    x32 = x.astype(jnp.float32)
    return (0.5 * x32 * (1.0 + jax.lax.erf(x32 * math.sqrt(0.5)))).astype(x.dtype)


def layer_norm(dim, *, dtype, rngs):
    """LayerNorm, eps 1e-6, statistics in float32 whatever dtype it returns."""
    return nnx.LayerNorm(dim, epsilon=1e-6, use_fast_variance=False, dtype=dtype, rngs=rngs)


def drop_path(x, rate, key):
    """Stochastic depth (Huang et al. 2016): zero the branch x [B, N, D] of an example; rate: how often."""
    if key is None or rate is None:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, (x.shape[0], 1, 1))
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)
