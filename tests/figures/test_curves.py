"""Curves of a run, and how figures are written."""

import json
import re

import numpy as np
import pytest
from matplotlib.figure import Figure

from convit_jax.analysis.locality import patch_distances
from convit_jax.errors import UserError
from convit_jax.figures import locality
from convit_jax.figures.curves import plot_curves
from convit_jax.figures.style import save_figure

MODEL = {"image_size": (32, 48), "patch_size": 16, "local_up_to_layer": 2}


def test_a_figure_is_written_as_pixels_and_as_vectors_with_fonts_that_can_be_edited(tmp_path):
    figure = Figure(figsize=(1, 1))
    figure.text(0, 0, "words")
    paths = save_figure(figure, tmp_path / "new/folder", "of-0.1")
    assert paths == [tmp_path / "new/folder/of-0.1.png", tmp_path / "new/folder/of-0.1.pdf"]
    assert sorted((tmp_path / "new/folder").iterdir()) == sorted(paths)
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert b"/Subtype /Type0" in paths[1].read_bytes()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=re.escape(f"cannot write the picture {tmp_path}/file/x.png (")):
        save_figure(figure, tmp_path / "file", "x")


def test_learning_curves_of_a_log():
    log = [
        {"step": 5, "epoch": 0.5, "train_loss": 2.0, "train_top1": 20.0, "lr": 0.1},
        {"step": 10, "epoch": 1.0, "train_loss": 1.0, "train_top1": 60.0, "lr": 0.2},
        {"step": 10, "epoch": 1.0, "val_loss": 1.5, "val_top1": 50.0},
    ]

    def drawn():
        return [[line.get_xydata().tolist() for line in axes.lines] for axes in plot_curves(log).axes]

    points = drawn()
    assert points[0] == [[[0.5, 2.0], [1.0, 1.0]], [[1.0, 1.5]]]
    assert points[1] == [[[0.5, 20.0], [1.0, 60.0]], [[1.0, 50.0]]]
    assert points[2] == [[[0.5, 0.1], [1.0, 0.2]]]
    assert [line.get_marker() for line in plot_curves(log[:1]).axes[0].lines] == ["o"]
    log[2] |= {"val_ema_loss": 1.25, "val_ema_top1": 55.0}  # of a run that averages its weights
    added = [[[1.0, 1.25]]], [[[1.0, 55.0]]], []
    assert drawn() == [before + each for before, each in zip(points, added, strict=True)]


def test_locality_of_every_layer_and_head_by_epoch(tmp_path, monkeypatch):
    lines = [{"step": 5, "epoch": 0.5, "train_loss": 1.0}]
    for epoch in (1.0, 2.0):  # three blocks, two of them GPSA
        gates = [[0.1 * epoch, 0.2], [0.3, 0.4 * epoch]]
        nonlocality = [[1.0, 2.0 * epoch], [3.0, 4.0], [5.0, 6.0]]
        lines.append({"step": int(10 * epoch), "epoch": epoch, "gates": gates, "nonlocality": nonlocality})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawn = {}
    save = lambda figure, directory, name: [drawn.setdefault(name, figure)]  # noqa: E731
    monkeypatch.setattr(locality, "save_figure", save)
    locality.draw_locality(tmp_path, tmp_path, MODEL)
    (axes,) = drawn["nonlocality"].axes
    curves = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    np.testing.assert_allclose(np.array(curves.pop("uniform"))[:, 1], patch_distances((2, 3)).mean())
    assert curves == {
        "layer 1 (GPSA)": [[1, 1.5], [2, 2.5]],
        "layer 2 (GPSA)": [[1, 3.5], [2, 3.5]],
        "layer 3 (plain)": [[1, 5.5], [2, 5.5]],
    }
    ends = {text.get_text(): text.xy for text in axes.texts}
    assert ends == {"uniform": (2, pytest.approx(patch_distances((2, 3)).mean()))} | {
        name: tuple(points[-1]) for name, points in curves.items()
    }
    places = sorted(text.xyann[1] for text in axes.texts)
    assert np.diff(places).min() > 0.05 * axes.get_ylim()[1]  # also where curves end together
    panels = drawn["gates"].axes
    assert [axes.get_title() for axes in panels] == ["layer 1", "layer 2"]
    heads = {line.get_label(): line.get_ydata().tolist() for line in panels[1].lines}
    assert heads == {"1": [0.3, 0.3], "2": [0.4, 0.8], "mean": [0.35, 0.55]}
    assert locality.draw_locality(tmp_path / "none", tmp_path, MODEL) == []
