"""The transformer: scanned blocks, tokens, eager calls, randomness, dtypes, messages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convit_jax import create_model
from convit_jax.analysis.maps import layer_maps

SMALL = dict(num_classes=7, image_size=(16, 24), patch_size=8, embed_dim=16, num_heads=4, depth=4)
IMAGES = jax.random.normal(jax.random.key(5), (3, 16, 24, 3))


@functools.cache
def small(name="convit_tiny", **settings):
    """A model that tests share and do not change."""
    local = {"local_up_to_layer": 2} if name.startswith("convit") else {}
    return create_model(name, **{**SMALL, **local, **settings})


def as_one_program(function, model):
    """function(model) inside of jax.jit."""
    graphdef, params = nnx.split(model)
    return jax.jit(lambda params: function(nnx.merge(graphdef, params)))(params)


@pytest.mark.parametrize("name", ["convit_tiny", "deit_tiny"])
def test_scanned_blocks_equal_the_blocks_one_by_one(name):
    def one_by_one(model):
        x, tokens = model._embed(IMAGES, None)
        for number, block in enumerate(model.blocks):
            x = block(jnp.concatenate([tokens, x], axis=1) if number == model.local_up_to_layer else x)
        return model.norm(x[:, 0])

    expected = as_one_program(one_by_one, small(name))
    np.testing.assert_allclose(small(name).features(IMAGES), expected, atol=1e-5)


def test_the_distillation_token_has_its_own_head_and_logits_are_the_mean_of_both():
    model = small("deit_tiny", distilled=True)
    class_logits, distillation_logits = model.both_logits(IMAGES)
    np.testing.assert_allclose(model(IMAGES), (class_logits + distillation_logits) / 2, atol=1e-6)
    assert (class_logits != distillation_logits).all()
    assert model.pos_embed.shape == (1, 2 + 6, 16)
    other = nnx.merge(*nnx.split(model))
    other.dist_token[...] += jnp.arange(16.0)
    assert (other.both_logits(IMAGES)[1] != distillation_logits).all()


def test_eager_calls_and_gradients_are_compiled_once_for_all_models_of_the_same_settings():
    def results(model):
        def loss_fn(model):
            return model(IMAGES, key=jax.random.key(0)).mean()

        outputs = [model(IMAGES), model.features(IMAGES), model.attention_maps(IMAGES), layer_maps(model, IMAGES[0])]
        return jax.device_get([*outputs, loss_fn(model), nnx.grad(loss_fn)(model)])

    before = results(small())
    np.testing.assert_allclose(before[0], as_one_program(lambda model: model(IMAGES), small()), atol=1e-7)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    other = create_model("convit_tiny", seed=1, **SMALL, local_up_to_layer=2)
    for model in (small(), other):
        after = results(model)
        assert (model is other) == (np.abs(after[0] - before[0]).max() > 0)  # parameters are no constants
    assert not compiled


def test_a_head_of_ones_own_keeps_its_random_state():
    model = nnx.merge(*nnx.split(small()))
    model.head = nnx.Sequential(nnx.Dropout(0.5, rngs=nnx.Rngs(0)), nnx.Linear(16, 7, rngs=nnx.Rngs(0)))
    jitted = nnx.jit(lambda model: model(IMAGES))
    for call in (model, lambda images: jitted(model)):
        assert (call(IMAGES) != call(IMAGES)).any()


def test_training_mode_needs_randomness_if_there_are_drop_rates():
    model = nnx.merge(*nnx.split(small(drop_path_rate=0.5, drop_rate=0.1)))
    evaluated = model(IMAGES)
    model.train()
    with pytest.raises(ValueError, match="needs randomness: pass key"):
        model(IMAGES)
    trained = model(IMAGES, rngs=nnx.Rngs(dropout=3))
    assert np.abs(trained - evaluated).max() > 0
    np.testing.assert_array_equal(trained, model(IMAGES, key=nnx.Rngs(dropout=3).dropout()))
    assert model.attention_maps(IMAGES)[0].shape == (3, 4, 6, 6)  # not random
    np.testing.assert_array_equal(nnx.view(model, deterministic=True)(IMAGES), evaluated)
    model.eval()
    np.testing.assert_array_equal(model(IMAGES, rngs=nnx.Rngs(0)), evaluated)
    without_rates = small()
    without_rates.train()
    np.testing.assert_array_equal(without_rates(IMAGES), nnx.view(without_rates, deterministic=True)(IMAGES))
    without_rates.eval()


@pytest.mark.parametrize("distilled", [False, True])
def test_a_model_without_a_head_gives_features_and_takes_a_new_one(distilled):
    model = create_model("deit_tiny", **{**SMALL, "num_classes": 0, "distilled": distilled})
    tokens = model.forward_features(IMAGES)[:, : 1 + distilled]
    np.testing.assert_allclose(model(IMAGES), tokens.mean(axis=1), atol=1e-6)
    assert model.num_classes == 0
    model.reset_classifier(5)
    assert model.num_classes == 5
    heads = [model.head, *([model.head_dist] if distilled else [])]
    expected = sum(head(tokens[:, number]) for number, head in enumerate(heads)) / len(heads)
    np.testing.assert_allclose(model(IMAGES), expected, atol=1e-5)


@pytest.mark.parametrize(("name", "dropped"), [("convit_tiny", False), ("deit_tiny", True)])
def test_the_class_token_of_convit_is_not_dropped_even_without_gpsa_blocks(name, dropped):
    model = small(name, local_up_to_layer=0, drop_rate=0.5)
    tokens = [jax.jit(model._embed)(IMAGES, key)[1] for key in (None, jax.random.key(0))]
    assert (tokens[0] != tokens[1]).any() == dropped


def test_drop_path_rises_from_zero_at_the_first_block():
    def features(factor, key):
        """With the parameters of the second block multiplied."""
        graphdef, params = nnx.split(small("deit_tiny", depth=2, drop_path_rate=0.999))
        params["sa_blocks"] = jax.tree.map(lambda leaf: leaf.at[1].multiply(factor), params["sa_blocks"])
        return nnx.merge(graphdef, params).features(IMAGES, key=key)

    in_training, without_the_second = features(100, jax.random.key(0)), features(0, None)
    np.testing.assert_allclose(in_training, without_the_second, atol=1e-5)


def test_bfloat16_keeps_parameters_norms_softmax_and_logits_in_float32():
    model = small(dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}
    logits = model(IMAGES)
    assert logits.dtype == jnp.float32
    assert model.blocks[0](jnp.ones((1, 6, 16), jnp.bfloat16)).dtype == jnp.bfloat16
    np.testing.assert_allclose(logits, small()(IMAGES), atol=0.02)
    graphdef, params = nnx.split(model)

    def loss(params):
        return nnx.merge(graphdef, params)(IMAGES).sum()

    for function in (loss, jax.grad(loss)):
        text = str(jax.make_jaxpr(function)(params))
        assert "reduce_sum" in text
        for line in text.splitlines():
            if "= reduce_sum" in line or " exp " in line:
                assert ":bf16" not in line.split("=")[0], line


def test_init_has_the_original_distributions():
    small = dict(num_classes=100, image_size=(32, 48), depth=2, local_up_to_layer=1)
    model = create_model("convit_tiny", gate_init=0.0, **small)
    bound = (16 * 16 * 3) ** -0.5
    conv = model.patch_embed.proj.kernel[...]
    assert -bound < conv.min() < -0.99 * bound
    assert conv.max() < bound
    assert abs(float(conv.std()) - bound / 3**0.5) < 0.02 * bound
    assert 0 < np.abs(model.patch_embed.proj.bias[...]).max() < bound
    block = model.blocks[0]
    for kernel in (block.attn.qk.kernel, block.attn.proj.kernel, block.mlp.fc1.kernel, model.head.kernel):
        assert abs(float(kernel[...].std()) - 0.02) < 0.001
    for zero in (block.attn.proj.bias, block.mlp.fc1.bias, model.head.bias, block.norm1.bias):
        assert not zero[...].any()
    assert abs(float(model.pos_embed[...].std()) - 0.02) < 0.003
    np.testing.assert_array_equal(block.attn.gates(), 0.5)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.ones((3, 24, 24, 3), np.float32), r"\[3, 24, 24, 3\], but this model takes \[B, 16, 24, 3\]"),
        (np.ones((3, 16, 24, 3), np.uint8), r"images are uint8, but .*: use model.preprocess\(images\)"),
        (np.ones((3, 3, 16, 24), np.float32), r"channels first, pass images.transpose\(0, 2, 3, 1\)"),
        (np.ones((16, 24, 3), np.float32), r"it is one image, pass images\[None\]"),
        ([[0.0]], "images are a builtins.list: pass a JAX or numpy array"),
    ],
)
def test_unsuitable_images_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        small()(images)
    with pytest.raises(ValueError, match=message):
        small().map_attention(images, function=lambda attn, x: x)
