"""Attention maps: the parts of GPSA add up to the model's maps, for the right patch; the pages of figures."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from convit_jax import create_model
from convit_jax.analysis.maps import check_query, init_maps, layer_maps
from convit_jax.errors import UserError
from convit_jax.figures import maps as map_figures
from convit_jax.models.variants import model_settings

SMALL = dict(image_size=(12, 16), patch_size=4, embed_dim=16, depth=4, num_classes=5, num_heads=4)
IMAGE = jax.random.normal(jax.random.key(0), (12, 16, 3))
PIXELS = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
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
    settings = model_settings(
        "convit_tiny", **{**SMALL, "embed_dim": 20, "num_heads": 10}, local_up_to_layer=2
    )
    content, positions = init_maps(settings, 0, (1, 2), (1.0, 4.0), IMAGE)
    assert content.shape == (10, 3, 4)
    assert len(positions) == 2
    for head in range(9):
        peak = np.unravel_index(positions[1][head].argmax(), (3, 4))
        assert peak == (1 + head % 3 - 1, 2 + head // 3 - 1)
        assert positions[1][head].max() > positions[0][head].max()
    np.testing.assert_array_equal(positions[0][9], positions[1][9])  # beyond the filter: random
    content, (ordinary,) = init_maps({**settings, "conv_init": False}, 0, (1, 2), (1.0,))
    assert content is None
    assert ordinary.max() < 0.2
    with pytest.raises(UserError, match="no GPSA layer"):
        init_maps(model_settings("deit_tiny", **SMALL), 0, (1, 2), (1.0,))


def test_the_query_is_a_patch():
    assert check_query(None, (3, 4)) == (1, 2)
    assert check_query((2, 3), (3, 4)) == (2, 3)
    with pytest.raises(UserError, match="query is 3,0, but the images have 3 rows and 4 columns"):
        check_query((3, 0), (3, 4))


def test_the_scale_is_logarithmic_and_darkens_all_the_way():
    np.testing.assert_allclose(map_figures.strength(np.array([0, 1 / 16, 1 / 4, 1]), 16), [0, 0, 0.5, 1])
    luminance = map_figures.colours(np.linspace(0, 1, 50)) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luminance) < 0).all()
    uniform = map_figures.over_image(np.zeros((3, 4)), None)
    assert uniform.shape == (3 * 28, 4 * 28, 3)
    assert (uniform == 255).all()


def test_colours_are_those_of_the_bar_on_any_image():
    values = np.array([[0, 0.2, 0.5, 1]])
    dark, light = (map_figures.over_image(values, np.full((4, 16, 3), grey, np.uint8)) for grey in (0, 255))
    np.testing.assert_array_equal(dark[:, 28:], light[:, 28:])
    np.testing.assert_array_equal(dark[0, 28::28], np.round(255 * map_figures.colours(values[0, 1:])))
    assert (dark[:, :28] == 204).all()  # faded
    assert (light[:, :28] == 255).all()


def on_common_scale(maps, image):
    """The pixels of each of some maps [H, rows, columns]."""
    return [map_figures.over_image(map_figures.strength(head, head.size), image) for head in maps]


def caught(monkeypatch):
    """{name: Figure} of the pages drawn from now on."""
    drawn = {}
    monkeypatch.setattr(map_figures, "save", lambda figure, stem: [drawn.setdefault(stem.name, figure)])
    return drawn


def maps_of(figure, shape):
    """The pixels of each map of a page, in their order; shape: theirs."""
    pictures = [np.asarray(image.get_array()) for image in figure.axes[0].images]
    return [pixels for pixels in pictures if pixels.shape == shape]


def test_a_page_for_each_kind_of_map(tmp_path, monkeypatch):
    layers = layer_maps(convit(), IMAGE, QUERY)
    layers[0] = dataclasses.replace(layers[0], gates=np.array([0.125, 0.25, 1, 0]))
    drawn = caught(monkeypatch)
    map_figures.attention_pages(tmp_path, layers, PIXELS, QUERY)
    kinds = ("query", "query_content", "query_position", "class_token")
    assert tuple(drawn) == kinds
    for kind, shown in (
        ("query", [layer.query for layer in layers]),
        ("query_content", [layer.content for layer in layers[:2]]),
        ("query_position", [layer.position for layer in layers[:2]]),
        ("class_token", [layer.tokens[0] for layer in layers[2:]]),
    ):
        expected = on_common_scale([head for maps in shown for head in maps], PIXELS)
        np.testing.assert_array_equal(maps_of(drawn[kind], (84, 112, 3)), expected)
    assert [words.split()[1] for words in map_figures.gates(layers[0])] == ["0.12", "0.25", "1.00", "0.00"]


def test_pages_of_a_distilled_deit_and_of_the_init(tmp_path, monkeypatch):
    drawn = caught(monkeypatch)
    model = create_model("deit_tiny", **SMALL, distilled=True)
    map_figures.attention_pages(tmp_path, layer_maps(model, IMAGE, QUERY), PIXELS, QUERY)
    assert list(drawn) == ["query", "class_token", "distillation_token"]
    assert map_figures.shares(np.array([[0.25, 0.5]])) == ["cls 0.25 dist 0.50"]
    maps = np.linspace(0, 1, 72).reshape(6, 3, 4)
    position = on_common_scale(maps, None)
    for strengths, image, content in (((0.5,), PIXELS, 0.08 + 0.02 * maps), (None, None, None)):
        drawn.clear()
        map_figures.init_page(tmp_path, content, [maps], strengths, image, QUERY)
        shown = maps_of(drawn["init"], (84, 112, 3))
        np.testing.assert_array_equal(shown[-6:], position)
        words = [text.get_text() for text in drawn["init"].axes[0].texts]
        assert ("0.96/12" in words and "1.20/12" in words) == (content is not None)
        assert len(shown) == (6 if content is None else 12)
        if content is not None:  # from the first colour of the palette to its last
            first, last = np.round(255 * map_figures.colours(np.array([1e-12, 1.0])))
            np.testing.assert_array_equal([shown[0][0, 0], shown[5][-1, -1]], [first, last])
