"""Attention maps: the parts of GPSA add up to the model's own maps, for the right patch."""

import jax
import numpy as np
import pytest
from flax import nnx

from convit_jax import create_model
from convit_jax.analysis.maps import init_maps, layer_maps
from convit_jax.errors import UserError
from convit_jax.models.variants import model_settings, new_model

SMALL = dict(image_size=(12, 16), patch_size=4, embed_dim=16, depth=4, num_classes=5, num_heads=4)
IMAGE = jax.random.normal(jax.random.key(0), (12, 16, 3))


def convit(**settings):
    """A ConViT of 2 GPSA layers with other gates and contents in each."""
    model = create_model("convit_tiny", **SMALL, local_up_to_layer=2, **settings)
    attn = model.gpsa_blocks.attn
    attn.gating_param = nnx.Param(jax.random.normal(jax.random.key(1), (2, 4)))
    attn.qk.kernel = nnx.Param(30 * attn.qk.kernel[...])
    return model


def test_the_parts_add_up_to_the_maps_of_the_model():
    model = convit()
    layers = layer_maps(model, IMAGE)
    for layer, maps in zip(layers, model.attention_maps(IMAGE[None]), strict=True):
        np.testing.assert_allclose(layer.attention, maps[0], atol=1e-6)
        np.testing.assert_allclose(layer.content.sum(-1), 1, atol=1e-5)
    for layer, block in zip(layers[:2], model.blocks[:2], strict=True):
        np.testing.assert_array_equal(layer.gates, block.attn.gates())
        np.testing.assert_allclose(layer.position, block.attn.positional_probabilities(), atol=1e-6)
        assert np.abs(layer.position - layer.content).max() > 0.05
    for layer in layers[2:]:
        assert layer.gates is layer.rows is layer.columns is None


def test_heads_start_as_the_pixels_of_a_filter():
    settings = model_settings("convit_tiny", **{**SMALL, "embed_dim": 20, "num_heads": 10}, local_up_to_layer=2)
    content, positions = init_maps(settings | {"locality_strength": 2.0}, 0, (1, 2), IMAGE)
    expected = layer_maps(new_model(settings, 0), IMAGE)[0].content[:, 1 * 4 + 2]
    np.testing.assert_allclose(content, expected.reshape(10, 3, 4), atol=1e-6)
    assert list(positions) == [1.0, 2.0, 4.0]
    for head in range(9):
        peak = np.unravel_index(positions[4.0][head].argmax(), (3, 4))
        assert peak == (1 + head % 3 - 1, 2 + head // 3 - 1)
        assert positions[4.0][head].max() > positions[1.0][head].max()
    for strength in positions:  # also of the head beyond the filter, which starts at random
        attn = new_model(settings | {"locality_strength": strength}, 0).blocks[0].attn
        expected = attn.positional_probabilities()[:, 1 * 4 + 2].reshape(10, 3, 4)
        np.testing.assert_allclose(positions[strength], expected, atol=1e-6)
    content, ordinary = init_maps(settings | {"conv_init": False}, 0, (1, 2))
    assert content is None
    assert ordinary[None].max() < 0.2
    with pytest.raises(UserError, match="no GPSA layer"):
        init_maps(model_settings("deit_tiny", **SMALL), 0, (1, 2))
