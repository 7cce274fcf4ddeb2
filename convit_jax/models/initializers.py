"""Random initial values, the same as jax.random's, through two small programs that serve all shapes.

XLA compiles the loops of `jax.random.normal` again for every shape, nine seconds for a ConViT. Here one program
draws PIECE values from any position of the stream, and the shapes are made on the host.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry2x32_p

PIECE = 1 << 17  # values that a call draws


def trunc_normal(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """Returns draws from N(0, 0.02), float32 of `shape`. The original cuts at +-2, which is 100 sigma."""
    if not _is_concrete_threefry(key):
        return jax.random.normal(key, shape, jnp.float32) * jnp.float32(0.02)
    return _in_pieces(_normal_piece, key, shape)


def uniform(bound: float) -> Callable[..., jax.Array]:
    """Returns the initializer U(-bound, bound), PyTorch's default for convolutions."""

    def draw(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
        if not _is_concrete_threefry(key):
            return jax.random.uniform(key, shape, jnp.float32, -bound, bound)
        return _in_pieces(functools.partial(_uniform_piece, low=-bound, high=bound), key, shape)

    return draw


def _is_concrete_threefry(key: jax.Array) -> bool:
    return not isinstance(key, jax.core.Tracer) and jax.random.key_data(key).shape == (2,)


def _in_pieces(draw_piece: Callable[..., jax.Array], key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    count = math.prod(shape)
    pieces = [draw_piece(key, np.uint32(start)) for start in range(0, count, PIECE)]  # in parallel
    values = _aligned(shape)
    for part, piece in zip(np.split(values.reshape(-1), range(PIECE, count, PIECE)), pieces, strict=True):
        part[:] = np.asarray(piece)[: len(part)]
    return jax.device_put(values)


def stacked(arrays: Sequence[jax.Array]) -> jax.Array:
    """Returns jnp.stack of float32 arrays; outside of a trace on the host, which compiles nothing."""
    if isinstance(arrays[0], jax.core.Tracer):
        return jnp.stack(arrays)
    return jax.device_put(np.stack(arrays, out=_aligned((len(arrays), *arrays[0].shape))))


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """An empty float32 array that jax.device_put takes without a copy on a CPU."""
    memory = np.empty(4 * math.prod(shape) + 64, np.uint8)
    return np.ndarray(shape, np.float32, memory, -memory.ctypes.data % 64)


@jax.jit
def _normal_piece(key: jax.Array, start: jax.Array) -> jax.Array:
    """The values start, start + 1, ... of 0.02 jax.random.normal(key, ...)."""
    values = _uniform_piece(key, start, np.nextafter(np.float32(-1), np.float32(0)), np.float32(1))
    return np.float32(math.sqrt(2)) * jax.lax.erf_inv(values) * np.float32(0.02)


@jax.jit
def _uniform_piece(key: jax.Array, start: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """The values start, start + 1, ... of jax.random.uniform(key, ..., low, high), float32 [PIECE]."""
    counters = start + jnp.arange(PIECE, dtype=jnp.uint32)  # as in jax.random, one for each value
    first, second = threefry2x32_p.bind(*jax.random.key_data(key), jnp.zeros_like(counters), counters)
    ones = np.float32(1).view(np.uint32)  # the exponent of 1.0; random bits are the fraction
    values = jax.lax.bitcast_convert_type((first ^ second) >> 9 | ones, jnp.float32) - 1
    return jnp.maximum(low, values * (high - low) + low)
