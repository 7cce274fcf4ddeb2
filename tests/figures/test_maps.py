"""Pages of attention maps: the right map at the right place, in colours of one scale."""

import dataclasses

import numpy as np
import pytest

from convit_jax.analysis.maps import LayerMaps
from convit_jax.figures import maps

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
QUERY = (1, 3)  # of 3 x 4 patches
HEADS, GRID, PATCH = 4, (3, 4), 28


def attention(seed):
    values = np.random.default_rng(seed).dirichlet(np.ones(12), HEADS)
    return values.reshape(HEADS, *GRID)


def layer(seed, tokens=0, gated=True):
    """LayerMaps with other numbers in each map."""
    parts = {name: attention(seed + n) for n, name in enumerate(("query", "content", "position"))}
    if not gated:
        parts |= {"content": None, "position": None}
    of_tokens = np.stack([attention(seed + 5 + n) for n in range(tokens)]) if tokens else np.zeros((0, HEADS, *GRID))
    gates = np.array([0.125, 0.25, 1, 0]) if gated else None
    shares = np.full((HEADS, tokens), 0.25)
    return LayerMaps(
        **parts,
        query_tokens=shares,
        gates=gates,
        tokens=of_tokens,
        tokens_tokens=np.full((tokens, HEADS, tokens), 0.5),
    )


@pytest.fixture
def pages(monkeypatch):
    """{name: Figure} of the pages drawn in the test."""
    drawn = {}
    monkeypatch.setattr(maps, "save_figure", lambda figure, directory, name: [drawn.setdefault(name, figure)])
    return drawn


def shown(axes):
    """The pixels of each map [rows of maps, columns of maps, height, width, 3] in axes."""
    pixels = np.asarray(axes.images[0].get_array())
    down, across = GRID[0] * PATCH + maps.CAPTION + maps.GAP, GRID[1] * PATCH + maps.GAP
    return [
        [
            pixels[top : top + GRID[0] * PATCH, left : left + GRID[1] * PATCH]
            for left in range(0, pixels.shape[1], across)
        ]
        for top in range(0, len(pixels), down)
    ]


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_a_page_per_kind_of_map(pages, tmp_path):
    layers = [layer(0), layer(10), layer(20, tokens=2, gated=False)]
    maps.draw_attention_maps(tmp_path, layers, PIXELS, QUERY)
    expected = {
        "query": [each.query for each in layers],
        "query_content": [each.content for each in layers[:2]],
        "query_position": [each.position for each in layers[:2]],
        "class_token": [layers[2].tokens[0]],
        "distillation_token": [layers[2].tokens[1]],
    }
    assert list(pages) == list(expected)
    for name, rows in expected.items():
        axes = pages[name].axes[-1]
        found = shown(axes)
        assert (len(found), len(found[0])) == (len(rows), HEADS)
        for row, values in zip(found, rows, strict=True):
            for pixels, head in zip(row, values, strict=True):
                colors = pixels[PATCH // 2 :: PATCH, PATCH // 2 :: PATCH].astype(int)
                above = head > 1 / 12 + 1e-6
                norm, palette = maps._common_norm(GRID), maps._palette()
                np.testing.assert_array_equal(colors[above], palette(norm(head[above]), bytes=True)[:, :3])
                grey = colors[~above]  # the faded image
                assert (grey.min(1) == grey.max(1)).all()
                assert (grey >= 204).all()
        frames = [patch for patch in axes.patches if patch.get_width() == PATCH]
        assert len(frames) == (0 if "token" in name else len(rows) * HEADS)
        if frames:
            assert frames[0].get_xy() == (QUERY[1] * PATCH, QUERY[0] * PATCH)
    assert [words.split()[1] for words in texts(pages["query"].axes[-1])[:4]] == [
        "0.12",
        "0.25",
        "1.00",
        "0.00",
    ]
    assert texts(pages["query"].axes[-1])[-1] == "cls 0.25 dist 0.25"
    assert [label.get_text() for label in pages["query"].axes[-1].get_yticklabels()] == [
        "layer 1\nGPSA",
        "layer 2\nGPSA",
        "layer 3\nplain",
    ]


def test_a_network_without_gates_has_no_parts(pages, tmp_path):
    maps.draw_attention_maps(tmp_path, [layer(0, tokens=1, gated=False)], PIXELS, QUERY)
    assert list(pages) == ["query", "class_token"]


def test_heads_before_training_stand_as_the_pixels_of_a_filter(pages, tmp_path):
    values = np.linspace(0.01, 1, 60).reshape(5, *GRID)
    maps.draw_init_maps(tmp_path, 0.08 + 0.02 * values, [values], [0.5], PIXELS, QUERY)
    _, content, position, *bars = pages["init"].axes
    assert texts(content) == texts(position) == [f"head {n}" for n in range(1, 6)]
    places = [text.get_position() for text in position.texts]
    assert places[0][0] == places[1][0] == places[4][0] < places[2][0] == places[3][0]  # 1 3, 2 4, 5
    assert places[0][1] == places[2][1] < places[1][1] == places[3][1] < places[4][1]
    first, last = maps._palette()([0.0, 1.0], bytes=True)[:, :3]
    cells = shown(content)
    np.testing.assert_array_equal([cells[0][0][0, 0], cells[2][0][-1, -1]], [first, last])  # a linear scale
    assert (shown(position)[0][0][0, 0] == 255).all()  # below uniform
    ends = [[label.get_text() for label in bar.get_xticklabels()] for bar in bars]
    assert ends == [["8.02 %", "10 %"], ["8.33 %", "100 %"]]
    pages.clear()
    maps.draw_init_maps(tmp_path, None, [values], None, None, QUERY)
    assert pages["init"].axes[0].get_title() == "position, ordinary init"


def test_colours_only_get_darker():
    luminance = maps._palette()(np.linspace(0, 1, 50))[:, :3] @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(luminance) < 0).all()


def test_a_page_is_written_for_every_grid(tmp_path):
    one = dataclasses.replace(layer(0, tokens=1, gated=False), query=np.full((1, 2, 20), 1 / 40))
    one = dataclasses.replace(
        one, query_tokens=np.ones((1, 1)), tokens=one.query[None], tokens_tokens=np.ones((1, 1, 1))
    )
    paths = maps.draw_attention_maps(tmp_path / "new", [one], np.zeros((8, 80, 3), np.uint8), (0, 19))
    assert sorted(paths) == sorted((tmp_path / "new").iterdir())
