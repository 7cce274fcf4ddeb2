"""The way around cuDNN's kernel, with XLA in the kernel's place: it computes what the other way does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.cudnn import fused_attention_stablehlo as kernel
from models.test_attention import GRIDS, explicit, random_gpsa

from convit_jax import create_model
from convit_jax.errors import UserError
from convit_jax.models import kernels
from convit_jax.models.attention import SelfAttention
from convit_jax.models.variants import abstract_model, model_settings
from convit_jax.models.vit import VisionTransformer

SMALL = dict(num_classes=7, image_size=(16, 24), patch_size=8, embed_dim=32, num_heads=4, depth=4)


def value_and_gradients(function, module, x):
    """function(module, x), and the gradients of a weighted sum of it for all parameters and x."""
    graphdef, params = nnx.split(module)

    def value(params, x):
        out = function(nnx.merge(graphdef, params), x)
        weights = jax.random.normal(jax.random.key(3), out.shape)
        return jnp.sum(weights * out) / jnp.linalg.norm(weights), out

    return jax.tree.leaves(jax.jit(jax.grad(value, argnums=(0, 1), has_aux=True))(params, x))


def assert_close(found, expected, **tolerance):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


@pytest.mark.parametrize("grid", GRIDS)
def test_gpsa_equals_its_definition_in_value_and_gradient(grid, xla_for_cudnn):
    layer = random_gpsa(grid, attention="cudnn", qkv_bias=True)
    x = jax.random.normal(jax.random.key(2), (3, grid[0] * grid[1], 24))
    found = value_and_gradients(lambda layer, x: layer(x), layer, x)
    assert_close(found, value_and_gradients(explicit, layer, x), atol=1e-5)


@pytest.mark.parametrize("tokens", [6, 7])
def test_plain_attention_equals_the_other_way_for_even_and_odd_numbers_of_tokens(tokens, xla_for_cudnn):
    x = jax.random.normal(jax.random.key(2), (3, tokens, 24))
    found, expected = (
        value_and_gradients(
            lambda layer, x: layer(x),
            SelfAttention(24, 3, qkv_bias=True, attention=attention, rngs=nnx.Rngs(0)),
            x,
        )
        for attention in ("cudnn", "xla")
    )
    assert_close(found, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["convit_tiny", "deit_tiny"])
@pytest.mark.parametrize("changed", [{}, {"scan_unroll": 4}, {"remat": True}])
def test_a_whole_model_gives_the_same_logits_and_gradients(name, changed, xla_for_cudnn):
    local = {"local_up_to_layer": 2} if name == "convit_tiny" else {}
    images = jax.random.normal(jax.random.key(5), (3, 16, 24, 3))
    results = []
    for attention in ("xla", "cudnn"):  # in float32, which the settings of a model refuse
        settings = {**model_settings(name, **SMALL, **local), **changed, "attention": attention}
        model = VisionTransformer(**settings, rngs=nnx.Rngs(0))
        results.append(value_and_gradients(lambda model, x: model.features(x), model, images))
    assert_close(*results, atol=1e-5)


def test_the_kernel_does_not_run_again_for_the_gradient(monkeypatch):
    monkeypatch.setattr(kernels, "available", lambda: True)
    monkeypatch.setattr(kernel, "check_cudnn_version", lambda: 91000)  # there is none: traced, not run
    settings = model_settings(
        "convit_tiny", **SMALL, local_up_to_layer=2, dtype="bfloat16", attention="cudnn"
    )
    graphdef, params = abstract_model(settings)
    loss = jax.grad(lambda params, images: nnx.merge(graphdef, params)(images).sum())
    traced = str(jax.make_jaxpr(loss)(params, jax.ShapeDtypeStruct((2, 16, 24, 3), "float32")))
    # In the loop over the GPSA blocks, and in that over the plain ones but for the last.
    assert traced.count("dot_product_attention_fwd_wrapper[") == 2
    assert traced.count("dot_product_attention_bwd_wrapper[") == 2


def test_without_such_a_gpu_a_model_is_computed_as_ever():
    local = dict(local_up_to_layer=2, dtype="bfloat16")
    images = jax.random.normal(jax.random.key(5), (3, 16, 24, 3))
    logits = [create_model("convit_tiny", **SMALL, **local, attention=a)(images) for a in ("xla", "cudnn")]
    np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention": "flash"}, "attention is 'flash': choose xla or cudnn"),
        ({"attention": "cudnn"}, "dtype float32: its kernel takes bfloat16"),
        (
            {"attention": "cudnn", "dtype": "bfloat16", "embed_dim": 36},
            "heads of 9: its kernel takes multiples of 8",
        ),
    ],
)
def test_what_the_kernel_does_not_take_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        model_settings("convit_tiny", **{**SMALL, "local_up_to_layer": 2, **settings})
