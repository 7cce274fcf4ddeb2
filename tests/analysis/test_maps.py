"""Attention maps: the parts of GPSA add up to the model's own maps, for the right patch."""

import jax
import numpy as np
import pytest
from flax import nnx

from convit_jax import create_model
from convit_jax.analysis.maps import full_maps, init_maps, layer_maps
from convit_jax.errors import UserError
from convit_jax.models.variants import model_settings

SMALL = dict(image_size=(12, 16), patch_size=4, embed_dim=16, depth=4, num_classes=5, num_heads=4)
IMAGE = jax.random.normal(jax.random.key(0), (12, 16, 3))
QUERY = (1, 3)  # patch 7 of 3 x 4


def convit(**settings):
    """A ConViT of 2 GPSA layers with other gates and contents in each."""
    model = create_model("convit_tiny", **SMALL, local_up_to_layer=2, **settings)
    attn = model.gpsa_blocks.attn
    attn.gating_param = nnx.Param(jax.random.normal(jax.random.key(1), (2, 4)))
    attn.qk.kernel = nnx.Param(30 * attn.qk.kernel[...])
    return model


def test_the_parts_add_up_to_the_maps_of_the_model():
    model = convit()
    layers = layer_maps(model, IMAGE, QUERY)
    for layer, maps in zip(layers, model.attention_maps(IMAGE[None]), strict=True):
        extra = maps.shape[-1] - 12
        expected = np.asarray(maps[0, :, extra + 7])
        np.testing.assert_allclose(layer.query.reshape(4, 12), expected[:, extra:], atol=1e-6)
        np.testing.assert_array_equal(layer.query_tokens, expected[:, :extra])
    for layer, block in zip(layers[:2], model.blocks[:2], strict=True):
        gate = layer.gates[:, None, None]
        np.testing.assert_array_equal(layer.gates, block.attn.gates())
        np.testing.assert_allclose(gate * layer.position + (1 - gate) * layer.content, layer.query, atol=1e-6)
        assert np.abs(layer.position - layer.content).max() > 0.05
        assert layer.tokens.shape == (0, 4, 3, 4)
    for layer, full, maps in zip(layers, full_maps(model, IMAGE), model.attention_maps(IMAGE[None]), strict=True):
        expected = full.content
        if layer.gates is not None:
            position = np.einsum("hyY,hxX->hyxYX", full.rows, full.columns).reshape(4, 12, 12)
            gate = full.gates[:, None, None]
            expected = (1 - gate) * full.content + gate * position
        np.testing.assert_allclose(expected, maps[0], atol=1e-6)
    for layer in layers[2:]:
        assert layer.gates is layer.content is layer.position is None
        total = layer.tokens.sum((-2, -1)) + layer.tokens_tokens.sum(-1)
        np.testing.assert_allclose(total, np.ones((1, 4)), atol=1e-6)


def test_two_tokens_of_a_distilled_deit():
    model = create_model("deit_tiny", **SMALL, distilled=True)
    maps = [np.asarray(each[0]) for each in model.attention_maps(IMAGE[None])]
    for layer, whole in zip(layer_maps(model, IMAGE, QUERY), maps, strict=True):
        np.testing.assert_allclose(layer.tokens[1].reshape(4, 12), whole[:, 1, 2:], atol=1e-6)
        np.testing.assert_allclose(layer.tokens_tokens[0], whole[:, 0, :2], atol=1e-6)
        np.testing.assert_allclose(layer.query_tokens, whole[:, 2 + 7, :2], atol=1e-6)


def test_heads_start_as_the_pixels_of_a_filter():
    settings = model_settings("convit_tiny", **{**SMALL, "embed_dim": 20, "num_heads": 10}, local_up_to_layer=2)
    content, positions = init_maps(settings | {"locality_strength": 2.0}, 0, (1, 2), IMAGE)
    assert content.shape == (10, 3, 4)
    assert list(positions) == [1.0, 2.0, 4.0]
    for head in range(9):
        peak = np.unravel_index(positions[4.0][head].argmax(), (3, 4))
        assert peak == (1 + head % 3 - 1, 2 + head // 3 - 1)
        assert positions[4.0][head].max() > positions[1.0][head].max()
    np.testing.assert_array_equal(positions[1.0][9], positions[4.0][9])  # beyond the filter: random
    content, ordinary = init_maps(settings | {"conv_init": False}, 0, (1, 2))
    assert content is None
    assert ordinary[None].max() < 0.2
    with pytest.raises(UserError, match="no GPSA layer"):
        init_maps(model_settings("deit_tiny", **SMALL), 0, (1, 2))
