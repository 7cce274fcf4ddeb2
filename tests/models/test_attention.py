"""GPSA: the separable form against the definition, the convolutional init, dropout."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from flax import nnx

from convit_jax.models.attention import (
    GatedPositionalSelfAttention,
    SelfAttention,
    along_axes,
    attention,
    local_positional_weights,
)
from convit_jax.models.layers import dropout

GRIDS = [(6, 6), (3, 7), (5, 2), (1, 8)]


def random_gpsa(grid, *, dim=24, heads=4, dtype=jnp.float32, **settings):
    """A GPSA layer with every parameter random, gates and positional weights included."""
    layer = GatedPositionalSelfAttention(dim, heads, grid, dtype=dtype, rngs=nnx.Rngs(0), **settings)
    graphdef, params = nnx.split(layer)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [jax.random.normal(key, leaf.shape) * 0.4 for key, leaf in zip(keys, leaves, strict=True)]
    return nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))


def explicit(layer, x):
    """The layer's output from its explicit attention maps, the paper's definition."""
    batch, tokens, _ = x.shape
    v = layer.v(x).reshape(batch, tokens, layer.num_heads, -1)
    out = jnp.einsum("bhnm,bmhd->bnhd", layer.attention_maps(x), v.astype(jnp.float32))
    return layer.proj(out.reshape(x.shape))


@pytest.mark.parametrize("grid", GRIDS)
def test_separable_equals_explicit_in_value_and_gradient(grid):
    layer = random_gpsa(grid)
    x = jax.random.normal(jax.random.key(2), (3, grid[0] * grid[1], 24))
    graphdef, params = nnx.split(layer)
    weights = jax.random.normal(jax.random.key(3), x.shape)
    weights /= jnp.linalg.norm(weights)

    def outputs_and_gradients(function):
        def value(params, x):
            out = function(nnx.merge(graphdef, params), x)
            return jnp.sum(weights * out), out

        return jax.jit(jax.grad(value, argnums=(0, 1), has_aux=True))(params, x)

    ours, out = outputs_and_gradients(lambda layer, x: layer(x))
    theirs, expected = outputs_and_gradients(explicit)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("queries", [1, 7])
def test_attention_is_that_of_jax_in_value_and_gradient(queries):
    q, k, v, weights = (jax.random.normal(jax.random.key(i), (2, 3, 7, 8)) for i in range(4))
    q, weights = 3 * q[:, :, :queries], weights[:, :, :queries]

    def definition(q, k, v):
        q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
        return jax.nn.dot_product_attention(q, k, v).transpose(0, 2, 1, 3)

    def outputs_and_gradients(function):
        out, gradient = jax.vjp(function, q, k, v)
        return out, *gradient(weights)

    pairs = zip(outputs_and_gradients(attention), outputs_and_gradients(definition), strict=True)
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_attention_keeps_no_map_for_its_gradient_and_survives_large_scores():
    q, k, v = (100 * jax.random.normal(jax.random.key(i), (2, 3, 20, 8)) for i in range(3))
    out, gradient = jax.vjp(attention, q, k, v)
    assert max(leaf.size for leaf in jax.tree.leaves(gradient)) == q.size < 2 * 3 * 20 * 20
    assert all(jnp.isfinite(x).all() for x in (out, *gradient(out)))


def test_along_axes_is_the_outer_product_of_its_factors():
    a_y, a_x, v = (jax.random.normal(jax.random.key(3), s) for s in ((2, 3, 3), (2, 4, 4), (5, 2, 12, 6)))
    dense = jnp.stack([jnp.kron(y, x) for y, x in zip(a_y, a_x, strict=True)])
    expected = jnp.einsum("hnm,bhmd->bhnd", dense, v)
    np.testing.assert_allclose(along_axes(a_y, a_x, v), expected, atol=1e-5)


def test_bfloat16_agrees_to_its_accuracy():
    x = jax.random.normal(jax.random.key(2), (3, 21, 24))
    exact = random_gpsa((3, 7))(x)
    rounded = random_gpsa((3, 7), dtype=jnp.bfloat16)(x.astype(jnp.bfloat16))
    assert rounded.dtype == jnp.bfloat16
    error = jnp.abs(rounded.astype(jnp.float32) - exact)
    assert error.max() < 2**-8 * 4 * jnp.abs(exact).max()


@pytest.mark.parametrize("grid", GRIDS)
def test_positional_factors_are_the_softmax_over_the_grid(grid):
    layer = random_gpsa(grid)
    a_y, a_x = layer.positional_factors()
    tokens = grid[0] * grid[1]
    product = jnp.einsum("hyv,hxu->hyxvu", a_y, a_x).reshape(4, tokens, tokens)
    np.testing.assert_allclose(product, layer.positional_probabilities(), atol=1e-6)


def test_no_positional_tensor_over_pairs_of_patches_is_made():
    grid, dim = (6, 7), 24
    x = jnp.ones((3, 42, dim))

    def pairs(layer):
        """Number of values in the program that hold something for each pair of patches."""
        text = str(jax.make_jaxpr(lambda x: layer(x))(x))
        return text.count("42,42]")

    gpsa = GatedPositionalSelfAttention(dim, 4, grid, rngs=nnx.Rngs(0))
    assert pairs(gpsa) == pairs(SelfAttention(dim, 4, rngs=nnx.Rngs(0))) > 0


def test_attention_maps_are_distributions_and_match_dot_product_attention():
    layer = SelfAttention(24, 4, rngs=nnx.Rngs(0))
    x = 3 * jax.random.normal(jax.random.key(2), (2, 9, 24))
    maps = layer.attention_maps(x)
    assert maps.shape == (2, 4, 9, 9)
    np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-6)
    v = layer.qkv(x)[..., 48:].reshape(2, 9, 4, 6)
    np.testing.assert_allclose(
        layer(x), layer.proj(jnp.einsum("bhnm,bmhd->bnhd", maps, v).reshape(x.shape)), atol=1e-5
    )


@pytest.mark.parametrize("heads", [4, 6, 9, 16])
@pytest.mark.parametrize("strength", [0.5, 1.0, 2.0])
def test_local_init_equals_the_original(heads, strength):
    golden = json.loads((ROOT / "tests/golden/gpsa_local_init.json").read_text())
    expected = golden[f"heads{heads}_strength{strength}"]
    layer = GatedPositionalSelfAttention(
        heads * 4, heads, (3, 3), locality_strength=strength, rngs=nnx.Rngs(0)
    )
    square = int(heads**0.5) ** 2
    weights = layer.pos_proj.kernel[...].T[:square]
    np.testing.assert_array_equal(weights, expected["pos_proj_weight_first_square_heads"])
    np.testing.assert_array_equal(layer.gating_param[...], expected["gating"])
    np.testing.assert_array_equal(layer.v.kernel[...], np.eye(heads * 4))
    assert (np.abs(layer.pos_proj.kernel[...].T[square:]) < 0.1).all()


def test_without_conv_init_position_and_values_start_as_any_layer():
    layer = GatedPositionalSelfAttention(36, 9, (3, 3), conv_init=False, rngs=nnx.Rngs(0))
    for kernel in (layer.pos_proj.kernel, layer.v.kernel):
        assert 0.01 < np.std(kernel[...]) < 0.03
    np.testing.assert_array_equal(layer.gating_param[...], 1)


def test_the_strength_scales_the_heads_that_no_pixel_is_left_for():
    def weights(strength):
        attn = GatedPositionalSelfAttention(20, 5, (3, 3), locality_strength=strength, rngs=nnx.Rngs(0))
        return attn.pos_proj.kernel[...]

    np.testing.assert_allclose(weights(3.0), 3.0 * weights(1.0), rtol=1e-6)  # as the original does


def test_at_large_locality_strength_and_gate_it_is_a_convolution():
    rows, columns, heads, dim = 5, 6, 9, 18
    layer = GatedPositionalSelfAttention(
        dim, heads, (rows, columns), locality_strength=50.0, gate_init=50.0, rngs=nnx.Rngs(0)
    )
    x = jax.random.normal(jax.random.key(0), (2, rows * columns, dim))
    maps = np.asarray(layer.attention_maps(x)).reshape(2, heads, rows, columns, rows, columns)
    for head in range(heads):
        dx, dy = head // 3 - 1, head % 3 - 1  # head h1 + 3 * h2 is the filter's pixel (h2 - 1, h1 - 1)
        for y in range(1, rows - 1):
            for xx in range(1, columns - 1):
                assert (maps[:, head, y, xx, y + dy, xx + dx] > 1 - 1e-6).all()

    # So the layer is the 3 x 3 convolution whose taps are the heads' columns of proj.
    weight, bias = layer.proj.kernel[...].reshape(heads, dim // heads, dim), layer.proj.bias[...]
    image = x.reshape(2, rows, columns, heads, dim // heads)
    expected = bias
    for head in range(heads):
        dx, dy = head // 3 - 1, head % 3 - 1
        shifted = jnp.roll(image[..., head, :], (-dy, -dx), axis=(1, 2))
        expected = expected + shifted @ weight[head]
    inner = layer(x).reshape(2, rows, columns, dim)[:, 1:-1, 1:-1]
    np.testing.assert_allclose(inner, expected[:, 1:-1, 1:-1], atol=1e-5)


def test_positional_weights_are_symmetric_around_the_query():
    for heads in (4, 9, 16):
        np.testing.assert_allclose(local_positional_weights(heads, 1.0)[:2].sum(1), 0)


@pytest.mark.parametrize("kind", ["gpsa", "plain"])
def test_attention_dropout_is_unbiased_and_absent_in_evaluation(kind):
    settings = dict(attn_drop=0.5, rngs=nnx.Rngs(0))
    layer = (
        GatedPositionalSelfAttention(16, 4, (2, 3), **settings)
        if kind == "gpsa"
        else SelfAttention(16, 4, **settings)
    )
    x = jax.random.normal(jax.random.key(1), (2, 6, 16))
    many = jax.jit(jax.vmap(lambda key: layer(x, key=key)))
    outputs = many(jax.random.split(jax.random.key(2), 4000))
    assert outputs.std(0).min() > 0
    tolerance = 5 * np.asarray(outputs.std(0)) / 4000**0.5
    assert (np.abs(outputs.mean(0) - layer(x)) < tolerance).all()


def test_dropout_scales_what_it_keeps():
    x = jnp.ones((200, 200))
    dropped = dropout(x, 0.25, jax.random.key(0))
    kept = dropped != 0
    np.testing.assert_allclose(dropped[kept], 1 / 0.75, rtol=1e-6)
    assert abs(kept.mean() - 0.75) < 0.01
    assert dropout(x, 0.25, None) is x
