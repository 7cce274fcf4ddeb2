"""GPSA and plain attention against their definitions, on both back ends; the convolutional init; dropout."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from flax import nnx

from convit_jax.models.attention import GatedPositionalSelfAttention, SelfAttention, local_positional_weights
from convit_jax.models.kernels import softmax_attention
from convit_jax.models.layers import drop_path, dropout

GRIDS = [(3, 7), (1, 8)]  # odd and even numbers of tokens, which cuDNN takes in different ways


def random_gpsa(grid, *, dim=24, heads=4, dtype=jnp.float32, **settings):
    """A GPSA layer with all parameters random, including gates and positional weights."""
    layer = GatedPositionalSelfAttention(dim, heads, grid, dtype=dtype, rngs=nnx.Rngs(0), **settings)
    graphdef, params = nnx.split(layer)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [jax.random.normal(key, leaf.shape) * 0.4 for key, leaf in zip(keys, leaves, strict=True)]
    return nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))


def by_definition(layer, x):
    """The layer's output from its explicit attention maps."""
    batch, tokens, dim = x.shape
    values = layer.v(x) if hasattr(layer, "v") else layer.qkv(x)[..., 2 * dim :]
    values = values.reshape(batch, tokens, layer.num_heads, -1).astype(jnp.float32)
    return layer.proj(jnp.einsum("bhnm,bmhd->bnhd", layer.attention_maps(x), values).reshape(x.shape))


def outputs_and_gradients(function, layer, x):
    """function(layer, x), and the gradients of a weighted sum of it for all parameters and x."""
    graphdef, params = nnx.split(layer)

    def value(params, x):
        out = function(nnx.merge(graphdef, params), x)
        weights = jax.random.normal(jax.random.key(3), out.shape)
        return jnp.sum(weights * out) / jnp.linalg.norm(weights), out

    return jax.tree.leaves(jax.jit(jax.grad(value, argnums=(0, 1), has_aux=True))(params, x))


def assert_close(found, expected, **tolerance):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


@pytest.mark.parametrize("grid", GRIDS)
def test_separable_equals_explicit_in_value_and_gradient(grid, xla_for_cudnn):
    x = jax.random.normal(jax.random.key(2), (3, grid[0] * grid[1], 24))
    layers = {way: random_gpsa(grid, attention=way, qkv_bias=True) for way in ("xla", "cudnn")}
    expected = outputs_and_gradients(by_definition, layers["xla"], x)
    for layer in layers.values():
        assert_close(outputs_and_gradients(lambda layer, x: layer(x), layer, x), expected, atol=1e-5)
    a_y, a_x = layers["xla"].positional_factors()
    product = jnp.einsum("hyv,hxu->hyxvu", a_y, a_x).reshape(4, x.shape[1], x.shape[1])
    np.testing.assert_allclose(product, layers["xla"].positional_probabilities(), atol=1e-6)


def test_plain_attention_equals_its_definition_in_value_and_gradient(xla_for_cudnn):
    x = 3 * jax.random.normal(jax.random.key(2), (3, 7, 24))
    layers = [SelfAttention(24, 3, qkv_bias=True, attention=a, rngs=nnx.Rngs(0)) for a in ("xla", "cudnn")]
    np.testing.assert_allclose(layers[0].attention_maps(x).sum(-1), 1, atol=1e-6)
    expected = outputs_and_gradients(by_definition, layers[0], x)
    for layer in layers:
        assert_close(outputs_and_gradients(lambda layer, x: layer(x), layer, x), expected, atol=1e-5)
        np.testing.assert_allclose(layer(x, queries=2), layer(x)[:, :2], atol=1e-6)


def test_attention_keeps_no_map_for_its_gradient_and_survives_large_scores():
    q, k, v = (100 * jax.random.normal(jax.random.key(i), (2, 3, 20, 8)) for i in range(3))
    out, gradient = jax.vjp(softmax_attention, q, k, v)
    assert max(leaf.size for leaf in jax.tree.leaves(gradient)) == q.size < 2 * 3 * 20 * 20
    assert all(jnp.isfinite(x).all() for x in (out, *gradient(out)))


def test_convolutional_init_equals_the_original():
    golden = json.loads((ROOT / "tests/golden/gpsa_local_init.json").read_text())
    for heads in (4, 6, 9, 16):
        for strength in (0.5, 1.0, 2.0):
            expected = golden[f"heads{heads}_strength{strength}"]
            weights = local_positional_weights(heads, strength).T
            np.testing.assert_array_equal(weights, expected["pos_proj_weight_first_square_heads"])

    def layer(strength):
        return GatedPositionalSelfAttention(24, 6, (3, 3), locality_strength=strength, rngs=nnx.Rngs(0))

    gpsa, kernel = layer(1.0), layer(1.0).pos_proj.kernel[...]
    np.testing.assert_array_equal(kernel[:, :4], local_positional_weights(6, 1.0))
    np.testing.assert_array_equal(gpsa.gating_param[...], golden["heads6_strength1.0"]["gating"])
    np.testing.assert_array_equal(gpsa.v.kernel[...], np.eye(24))
    # Heads without a pixel stay random, scaled by the strength.
    assert 0 < np.abs(kernel[:, 4:]).max() < 0.1
    np.testing.assert_allclose(layer(3.0).pos_proj.kernel[:, 4:], 3 * kernel[:, 4:], rtol=1e-6)


def test_without_conv_init_position_and_values_start_as_any_layer():
    layer = GatedPositionalSelfAttention(36, 9, (3, 3), conv_init=False, rngs=nnx.Rngs(0))
    for kernel in (layer.pos_proj.kernel, layer.v.kernel):
        assert 0.01 < np.std(kernel[...]) < 0.03
    np.testing.assert_array_equal(layer.gating_param[...], 1)


def test_with_large_strength_and_gate_gpsa_is_a_convolution():
    rows, columns, heads, dim = 5, 6, 9, 18
    layer = GatedPositionalSelfAttention(
        dim, heads, (rows, columns), locality_strength=50.0, gate_init=50.0, rngs=nnx.Rngs(0)
    )
    x = jax.random.normal(jax.random.key(0), (2, rows * columns, dim))
    # The taps of the 3 x 3 filter are the heads' rows of proj: head h1 + 3 * h2 has pixel (h2 - 1, h1 - 1).
    taps = layer.proj.kernel[...].reshape(heads, dim // heads, dim)
    image = x.reshape(2, rows, columns, heads, dim // heads)
    expected = layer.proj.bias[...]
    for head in range(heads):
        dx, dy = head // 3 - 1, head % 3 - 1
        expected = expected + jnp.roll(image[..., head, :], (-dy, -dx), axis=(1, 2)) @ taps[head]
    out = layer(x).reshape(2, rows, columns, dim)
    np.testing.assert_allclose(out[:, 1:-1, 1:-1], expected[:, 1:-1, 1:-1], atol=1e-5)


def test_attention_dropout_is_unbiased_and_absent_in_evaluation():
    x, settings = jax.random.normal(jax.random.key(1), (2, 6, 16)), dict(attn_drop=0.5, rngs=nnx.Rngs(0))
    for layer in (SelfAttention(16, 4, **settings), GatedPositionalSelfAttention(16, 4, (2, 3), **settings)):
        outputs = jax.jit(jax.vmap(lambda key, layer=layer: layer(x, key=key)))(
            jax.random.split(jax.random.key(2), 1000)
        )
        assert outputs.std(0).min() > 0
        assert (np.abs(outputs.mean(0) - layer(x)) < 5 * outputs.std(0) / 1000**0.5).all()


def test_dropout_and_drop_path_scale_what_they_keep():
    x = jnp.ones((20_000, 2, 3))
    dropped = np.asarray(dropout(x, 0.25, jax.random.key(0)))
    kept = dropped != 0
    np.testing.assert_allclose(dropped[kept], 1 / 0.75, rtol=1e-6)
    assert abs(kept.mean() - 0.75) < 0.01
    examples = np.asarray(drop_path(x, 0.3, jax.random.key(0))).reshape(20_000, 6)
    assert (examples.min(1) == examples.max(1)).all()  # drop_path drops whole examples
    assert abs((examples[:, 0] == 0).mean() - 0.3) < 0.01
    np.testing.assert_allclose(examples.max(), 1 / 0.7, rtol=1e-6)
    assert dropout(x, 0.25, None) is drop_path(x, 0.25, None) is x
