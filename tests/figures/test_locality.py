"""Figures are written twice, or it is said in a sentence why not; learning curves of a log."""

import re

import numpy as np
import pytest
from matplotlib.figure import Figure

from convit_jax.errors import UserError
from convit_jax.figures.curves import curves
from convit_jax.figures.style import save


def test_a_figure_is_written_as_pixels_and_as_vectors_with_fonts_that_can_be_edited(tmp_path):
    figure = Figure(figsize=(1, 1))
    figure.text(0, 0, "words")
    paths = save(figure, tmp_path / "new/folder/of-0.1")
    assert paths == [tmp_path / "new/folder/of-0.1.png", tmp_path / "new/folder/of-0.1.pdf"]
    assert sorted((tmp_path / "new/folder").iterdir()) == sorted(paths)
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert b"/Subtype /Type0" in paths[1].read_bytes()
    (tmp_path / "file").write_text("")
    sentence = f"cannot write the picture {tmp_path}/file/x.png ("
    with pytest.raises(UserError, match=re.escape(sentence)):
        save(figure, tmp_path / "file/x")


def test_learning_curves_of_a_log():
    log = [
        {"step": 5, "epoch": 0.5, "train_loss": 2.0, "train_top1": 20.0, "lr": 0.1},
        {"step": 10, "epoch": 1.0, "train_loss": 1.0, "train_top1": 60.0, "lr": 0.2},
        {"step": 10, "epoch": 1.0, "val_loss": 1.5, "val_top1": 50.0},
    ]

    def drawn():
        return [[line.get_xydata().tolist() for line in panel.lines] for panel in curves(log).axes]

    points = drawn()
    np.testing.assert_array_equal(points[0][0], [[0.5, 2.0], [1.0, 1.0]])
    assert points[0][1] == [[1.0, 1.5]]
    assert points[1] == [[[0.5, 20.0], [1.0, 60.0]], [[1.0, 50.0]]]
    assert points[2] == [[[0.5, 0.1], [1.0, 0.2]]]
    log[2] |= {"val_ema_loss": 1.25, "val_ema_top1": 55.0}  # of a run that averages its weights
    of_ema = [[[1.0, 1.25]]], [[[1.0, 55.0]]], []
    assert drawn() == [before + added for before, added in zip(points, of_ema, strict=True)]
