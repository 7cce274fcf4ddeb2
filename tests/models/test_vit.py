"""The transformer: scanned blocks, class token, stochastic depth, dtypes, messages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from convit_jax import create_model
from convit_jax.models.layers import drop_path

SMALL = dict(num_classes=7, image_size=(16, 24), patch_size=8, embed_dim=16, num_heads=4, depth=4)


def small(name="convit_tiny", **settings):
    """A model of its own, of which those of the same settings are made once."""
    return nnx.merge(*small_parts(name, **settings))


@functools.cache
def small_parts(name, **settings):
    local = {"local_up_to_layer": 2} if name.startswith("convit") else {}
    return nnx.split(create_model(name, **{**SMALL, **local, **settings}))


def run(model, *args, method=None, **kwargs):
    """model(*args) or a method of it, as one compiled program."""
    graphdef, params = nnx.split(model)

    def call(params, args, kwargs):
        return getattr(nnx.merge(graphdef, params), method or "__call__")(*args, **kwargs)

    return jax.jit(call)(params, args, kwargs)


def images(batch=3):
    return jax.random.normal(jax.random.key(5), (batch, 16, 24, 3))


@pytest.mark.parametrize("name", ["convit_tiny", "deit_tiny"])
def test_scanned_blocks_equal_the_blocks_one_by_one(name):
    model = small(name)
    graphdef, params = nnx.split(model)

    @jax.jit
    def one_by_one(params, images):
        model = nnx.merge(graphdef, params)
        x, class_token = model._embed(images, None)
        for number, block in enumerate(model.blocks):
            if number == model.local_up_to_layer:
                x = jnp.concatenate([class_token, x], axis=1)
            x = block(x)
        return model.norm(x[:, 0])

    features = run(model, images(), method="features")
    np.testing.assert_allclose(features, one_by_one(params, images()), atol=1e-5)


def test_the_distillation_token_has_its_own_head_and_logits_are_the_mean_of_both():
    model = small("deit_tiny", distilled=True)
    class_logits, distillation_logits = run(model, images(), method="both_logits")
    np.testing.assert_allclose(run(model, images()), (class_logits + distillation_logits) / 2, atol=1e-6)
    assert (class_logits != distillation_logits).all()
    assert model.pos_embed.shape == (1, 2 + 6, 16)
    assert [maps.shape for maps in run(model, images(), method="attention_maps")] == [(3, 4, 8, 8)] * 4
    other = small("deit_tiny", distilled=True)
    other.dist_token[...] += jnp.arange(16.0)
    assert (run(other, images(), method="both_logits")[1] != distillation_logits).all()


def test_a_block_for_its_first_tokens_gives_what_the_whole_one_gives_there():
    block = small().blocks[3]
    x = jax.random.normal(jax.random.key(1), (2, 7, 16))
    np.testing.assert_allclose(block(x, queries=2), block(x)[:, :2], atol=1e-6)


def test_patches_are_embedded_as_by_a_strided_convolution():
    embed = small().patch_embed
    kernel, bias = embed.proj.kernel[...], embed.proj.bias[...]
    dimensions = ("NHWC", "HWIO", "NHWC")
    expected = jax.lax.conv_general_dilated(images(), kernel, (8, 8), "VALID", dimension_numbers=dimensions)
    np.testing.assert_allclose(embed(images()), (expected + bias).reshape(3, 6, 16), atol=1e-5)


def loss_and_params(**settings):
    """A loss with every kind of randomness, and what it depends on."""
    graphdef, params = nnx.split(small(drop_path_rate=0.3, drop_rate=0.2, attn_drop_rate=0.1, **settings))
    return lambda p: jnp.sum(nnx.merge(graphdef, p)(images(), key=jax.random.key(0)) ** 2), params


@pytest.fixture
def nothing_recomputed(monkeypatch):
    """A function that switches recomputing off."""
    return lambda: monkeypatch.setattr(jax, "checkpoint", lambda function, **_: function)


def test_recomputing_and_unrolling_change_no_gradient(nothing_recomputed):
    found = []
    for setting in ({}, {"remat": True}, {"scan_unroll": 4}):
        loss, params = loss_and_params(**setting)
        found.append(jax.jit(jax.grad(loss))(params))
    nothing_recomputed()
    loss, params = loss_and_params()
    expected = jax.jit(jax.grad(loss))(params)
    for gradient in found:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), gradient, expected)


def test_only_the_product_by_a_y_is_computed_twice(nothing_recomputed):
    def products(jaxpr):
        inner = [products(inner) for eqn in jaxpr.eqns for inner in jaxprs_in_params(eqn.params)]
        return sum(eqn.primitive.name == "dot_general" for eqn in jaxpr.eqns) + sum(inner)

    def count():
        graphdef, params = nnx.split(small())
        gradient = jax.grad(lambda p: jnp.sum(nnx.merge(graphdef, p)(images()) ** 2))
        return products(jax.make_jaxpr(gradient)(params).jaxpr)

    as_it_is = count()
    nothing_recomputed()
    assert as_it_is == count() + 1  # counted once for all GPSA blocks, which are scanned


def test_attention_maps_per_block_with_the_class_token_where_it_joined():
    maps = run(small(), images(2), method="attention_maps")
    assert [m.shape for m in maps] == [(2, 4, 6, 6)] * 2 + [(2, 4, 7, 7)] * 2
    for m in maps:
        np.testing.assert_allclose(m.sum(-1), 1, atol=1e-6)


def test_the_class_token_of_convit_joins_late_and_that_of_deit_at_once():
    convit, deit = small(), small("deit_tiny")
    assert convit.pos_embed.shape == (1, 6, 16)
    assert deit.pos_embed.shape == (1, 7, 16)
    assert [m.shape[-1] for m in run(deit, images(1), method="attention_maps")] == [7] * 4
    assert convit.blocks[0].attn.qk.bias is None
    assert deit.blocks[0].attn.qkv.bias is not None


def test_a_block_starts_the_same_wherever_the_class_token_joins():
    early, late = small(local_up_to_layer=1), small(local_up_to_layer=2)
    for name in ("fc1", "fc2"):
        for number in range(4):
            kernels = [getattr(model.blocks[number].mlp, name).kernel[...] for model in (early, late)]
            np.testing.assert_array_equal(*kernels)


def test_evaluation_is_deterministic_and_training_is_not():
    model = small(drop_path_rate=0.5, drop_rate=0.1)
    np.testing.assert_array_equal(run(model, images()), run(model, images()))
    with_key = [run(model, images(), key=jax.random.key(seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(with_key[0], with_key[1])
    assert np.abs(with_key[0] - with_key[2]).max() > 0


def test_drop_path_drops_whole_examples_and_rescales_the_rest():
    x = jnp.ones((20_000, 2, 3))
    dropped = drop_path(x, 0.3, jax.random.key(0))
    per_example = np.asarray(dropped).reshape(20_000, 6)
    assert (per_example.min(1) == per_example.max(1)).all()
    assert abs((per_example[:, 0] == 0).mean() - 0.3) < 0.01
    np.testing.assert_allclose(per_example.max(), 1 / 0.7, rtol=1e-6)


def test_drop_path_rises_linearly_from_nothing_at_the_first_block():
    # A block on its own is the first one, so it is never dropped; the last of two has the full rate.
    alone = small(depth=1, local_up_to_layer=0, drop_path_rate=0.9)
    np.testing.assert_allclose(run(alone, images(), key=jax.random.key(0)), run(alone, images()), atol=1e-6)
    two = small(depth=2, local_up_to_layer=1, drop_path_rate=0.999)
    graphdef, params = nnx.split(two)
    params["sa_blocks"] = jax.tree.map(
        lambda leaf: leaf * 100, params["sa_blocks"]
    )  # matters only if it runs
    model = nnx.merge(graphdef, params)
    kept = model.norm(model._embed(images(), None)[1][:, 0])  # the class token, untouched by a dropped block
    np.testing.assert_allclose(
        run(model, images(), key=jax.random.key(0), method="features"), kept, atol=1e-5
    )


def test_bfloat16_computes_so_and_keeps_parameters_and_logits_in_float32():
    model, exact = small(dtype="bfloat16"), small()
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
    logits = run(model, images())
    assert logits.dtype == jnp.float32
    assert model.blocks[0](jnp.ones((1, 6, 16), jnp.bfloat16)).dtype == jnp.bfloat16
    np.testing.assert_allclose(logits, run(exact, images()), atol=0.02)
    # Norms and softmax in float32, and the gradients of what is added to all tokens: no sum is of bfloat16.
    graphdef, params = nnx.split(model)
    gradient = jax.grad(lambda params: nnx.merge(graphdef, params)(images()).sum())
    for text in (str(jax.make_jaxpr(lambda x: model(x))(images())), str(jax.make_jaxpr(gradient)(params))):
        assert "reduce_sum" in text
        for line in text.splitlines():
            if "= reduce_sum" in line or " exp " in line:
                assert ":bf16" not in line.split("=")[0], line


@pytest.mark.parametrize("way", ["xla", "cudnn"])
def test_gradients_in_bfloat16_over_many_tokens(way, xla_for_cudnn):
    wide = dict(embed_dim=32, dtype="bfloat16", attention=way)
    pixels = jax.random.normal(jax.random.key(1), (640, 16, 24, 3)) + 0.3  # 640 x 6 tokens
    found = []
    for settings in ({"embed_dim": 32}, wide):
        graphdef, params = nnx.split(small(**settings))

        def loss(params, graphdef=graphdef):
            return jnp.mean(jax.nn.log_softmax(nnx.merge(graphdef, params)(pixels))[:, 0])

        found.append(nnx.to_pure_dict(jax.jit(jax.grad(loss))(params)))
    for tree in found:
        del tree["gpsa_blocks"]["attn"]["pos_proj"]["bias"]  # softmax cancels it
    for (path, exact), rounded in zip(
        jax.tree_util.tree_leaves_with_path(found[0]), jax.tree.leaves(found[1]), strict=True
    ):
        error = jnp.linalg.norm(rounded - exact) / jnp.linalg.norm(exact)
        assert error < 0.03, (jax.tree_util.keystr(path), float(error))
        if rounded.size > 100:  # sums over all tokens are not rounded to bfloat16, before those over devices
            same = jnp.mean(rounded == rounded.astype(jnp.bfloat16))
            assert same < 0.1, (jax.tree_util.keystr(path), float(same))


def test_init_has_the_original_distributions():
    model = create_model("convit_tiny", num_classes=100, image_size=32)
    bound = (16 * 16 * 3) ** -0.5
    conv = model.patch_embed.proj.kernel[...]
    assert conv.min() < -0.99 * bound
    assert conv.max() < bound
    assert abs(float(conv.std()) - bound / 3**0.5) < 0.02 * bound
    assert 0 < np.abs(model.patch_embed.proj.bias[...]).max() < bound
    block = model.blocks[3]
    for kernel in (block.attn.qk.kernel, block.attn.proj.kernel, block.mlp.fc1.kernel, model.head.kernel):
        assert abs(float(kernel[...].std()) - 0.02) < 0.001
    for zero in (block.attn.proj.bias, block.mlp.fc1.bias, model.head.bias, block.norm1.bias):
        assert not zero[...].any()
    assert abs(float(model.pos_embed[...].std()) - 0.02) < 0.003


def test_images_of_another_size_are_refused_by_name():
    with pytest.raises(ValueError, match=r"\[3, 24, 24, 3\], this model takes \[B, 16, 24, 3\]"):
        small()(jnp.ones((3, 24, 24, 3)))


def test_pixels_that_were_not_normalised_are_refused():
    with pytest.raises(ValueError, match="images are uint8, this model takes normalised floats"):
        small()(jnp.ones((3, 16, 24, 3), jnp.uint8))
