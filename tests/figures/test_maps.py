"""Pages of attention maps: the right map at the right place, in colours of one scale."""

import numpy as np
import pytest

from convit_jax.analysis.maps import LayerMaps
from convit_jax.figures import maps

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
QUERY = (1, 3)  # patch 7 of 3 x 4
HEADS, GRID = 4, (3, 4)
DOWN, ACROSS = maps._steps(GRID)


def layer(seed, tokens=0, gated=True):
    """LayerMaps with other numbers in each map."""
    rng = np.random.default_rng(seed)
    attention = lambda size: rng.dirichlet(np.ones(size), (HEADS, size))  # noqa: E731
    gates = np.array([0.125, 0.25, 1, 0])
    parts = (gates, attention(GRID[0]), attention(GRID[1])) if gated else (None, None, None)
    return LayerMaps(attention(12 + tokens), *parts)


def of(maps, token):
    """What a page shows of maps [H, T + N, T + N] for one of the tokens."""
    return maps[:, token, -12:].reshape(HEADS, *GRID)


@pytest.fixture
def pages(monkeypatch):
    """{name: Figure} of the pages drawn in the test."""
    drawn = {}
    monkeypatch.setattr(maps, "save_figure", lambda figure, directory, name: [drawn.setdefault(name, figure)])
    return drawn


def shown(axes):
    """{(row, column): map} of the maps in axes."""
    pixels = np.asarray(axes.images[-1].get_array())
    starts = [(y, x) for y in range(0, len(pixels), DOWN) for x in range(0, pixels.shape[1], ACROSS)]
    maps = {(y // DOWN, x // ACROSS): pixels[y : y + GRID[0], x : x + GRID[1]] for y, x in starts}
    return {place: values for place, values in maps.items() if np.isfinite(values).all()}


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_a_page_per_kind_of_map(pages, tmp_path):
    layers = [layer(0), layer(10), layer(20, tokens=2, gated=False)]
    maps.draw_attention_maps(tmp_path, dict(zip((1, 4, 9), layers, strict=True)), PIXELS, GRID, QUERY)
    expected = {
        "query": [*(of(each.attention, 7) for each in layers[:2]), of(layers[2].content, 2 + 7)],
        "query_content": [of(each.content, 7) for each in layers[:2]],
        "query_position": [of(each.position, 7) for each in layers[:2]],
        "class_token": [of(layers[2].content, 0)],
        "distillation_token": [of(layers[2].content, 1)],
    }
    assert list(pages) == list(expected)
    for name, rows in expected.items():
        axes = pages[name].axes[1]
        found = shown(axes)
        assert len(found) == len(rows) * HEADS
        for (row, head), values in found.items():
            np.testing.assert_array_equal(values, rows[row][head])
        faded, colors = axes.images
        assert (colors.norm.vmin, colors.norm.vmax) == (1 / 12, 1)
        assert faded.get_array().min() >= 204
        frames = [patch for patch in axes.patches if patch.get_width() == 1]
        assert len(frames) == (0 if "token" in name else len(rows) * HEADS)
        if frames:
            assert frames[0].get_xy() == (QUERY[1], QUERY[0])
    axes = pages["query"].axes[1]
    assert [words.split()[1] for words in texts(axes)[:4]] == ["0.12", "0.25", "1.00", "0.00"]
    to_class, to_distillation = layers[2].content[-1, 2 + 7, :2]
    assert texts(axes)[-1] == f"cls {to_class:.2f} dist {to_distillation:.2f}"
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["layer 1\nGPSA", "layer 4\nGPSA", "layer 9\nplain"]
    pages.clear()
    maps.draw_attention_maps(tmp_path, dict.fromkeys(range(12), layer(0, tokens=1, gated=False)), PIXELS, GRID, QUERY)
    assert list(pages) == ["query", "class_token"]
    assert pages["query"].get_figheight() <= maps.PAGE[1] + 1e-6
    pages.clear()
    maps.draw_attention_maps(tmp_path, {12: layer(0, gated=False)}, PIXELS, GRID, QUERY)
    photo, axes, _ = pages["query"].axes
    assert photo.get_position().x1 < axes.get_position().x0  # next to each other
    assert pages["query"].get_figwidth() <= maps.PAGE[1] + 1e-6


def test_heads_before_training_stand_as_the_pixels_of_a_filter(pages, tmp_path):
    values = np.linspace(0.01, 1, 60).reshape(5, *GRID)
    maps.draw_init_maps(tmp_path, 0.08 + 0.02 * values, {0.5: values}, PIXELS, QUERY)
    _, content, position, _, _ = pages["init"].axes
    assert texts(content) == texts(position) == [f"head {n}" for n in range(1, 6)]
    found = shown(position)
    for place, head in zip([(0, 0), (1, 0), (0, 1), (1, 1), (2, 0)], values, strict=True):
        np.testing.assert_array_equal(found.pop(place), head)
    assert not found
    norm = content.images[0].norm
    assert (norm.vmin, norm.vmax) == (pytest.approx(0.0802), pytest.approx(0.1))
    below, uniform, above, high = position.images[0].get_cmap()([-1.0, 0.0, 0.1, 1.0])[:, 3]
    assert below == uniform == 0 < above < high == 1  # fades in
    pages.clear()
    maps.draw_init_maps(tmp_path, None, {None: values}, None, QUERY)
    assert pages["init"].axes[0].get_title() == "position, ordinary init"
