"""Tables and figures of made-up outcomes."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from convit_jax.study import figure
from convit_jax.study.figure import draw_study
from convit_jax.study.plan import read_study
from convit_jax.study.runner import Outcome
from convit_jax.study.table import estimate_mean, format_markdown, gap_to_baseline, write_tables

DONE = Outcome("done", 10, 10, {"top1": 50.0, "top5": 90.0, "loss": 1.0}, best=51.0, seconds=7.5)


def scored(top1):
    return dataclasses.replace(DONE, last=DONE.last | {"top1": top1})


def test_gap_to_the_baseline_and_its_error():
    study = SimpleNamespace(baseline="b")

    def gap(numbers, baseline):
        means = {("a", None): estimate_mean(numbers), ("b", None): estimate_mean(baseline)}
        return gap_to_baseline(study, means).get(("a", None))

    # Of means with a standard error of 1 each, 13 and 10: 100 sqrt(1 + 1.3^2) / 10.
    assert gap([12.0, 14.0], [9.0, 11.0]) == pytest.approx((30.0, 10 * 2.69**0.5, 2))
    assert gap([12.0], [10.0]) == pytest.approx((20.0, np.nan, 1), nan_ok=True)
    assert gap([1.0], [0.0]) is None


def test_table_of_sample_efficiency():
    study = read_study("studies/digits.py:sample_efficiency")
    outcomes = {run.name: scored(60.0 + run.seed if run.row == "ConViT" else 50.0) for run in study.runs}
    outcomes["convit-0.05-seed0"] = Outcome("failed", 3, 10, failure="no room")
    for seed in range(5):
        outcomes[f"deit-0.02-seed{seed}"] = Outcome("to do")
    lines = format_markdown(study, outcomes).splitlines()
    assert "| model \\ fraction of each class | 2% | 5% | 10% | 30% | 100% |" in lines
    full, four = "62.00 ± 1.58", "62.50 ± 1.29 [n = 4]"
    assert f"| ConViT | {full} | {four} | {full} | {full} | {full} |" in lines
    assert "| DeiT | - | " + " | ".join(["50.00 ± 0.00"] * 4) + " |" in lines
    gap = "+24.0% ± 1.4%"
    assert f"| ConViT over DeiT | - | +25.0% ± 1.3% [n = 4] | {gap} | {gap} | {gap} |" in lines
    assert any("mean ± standard deviation over 4 to 5 seeds; relative gap" in line for line in lines)
    assert "- convit-0.05-seed0: no room" in lines
    assert "Not done yet: 5 of 50 runs." in lines


def test_numbers_of_the_paper_and_the_csv(tmp_path):
    study = read_study("studies/imagenet.py:ablations", ["--config.data.dir=x"])
    write_tables(study, {run.name: scored(80.0) for run in study.runs}, tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert "| ablation \\ images of each class | all | 10% |" in text
    assert "| d: gates fixed, no convolutional init | 80.00 (81.6) | 80.00 (54.6) |" in text
    assert "one seed; in brackets the paper's." in text
    assert "`python -m convit_jax.study studies/imagenet.py:ablations --config.data.dir=x`" in text
    head, *rows = (tmp_path / "table.csv").read_text().splitlines()
    assert head == "run,row,column,seed,state,step,steps,top1,top5,loss,best_top1,seconds,failure"
    assert len(rows) == 14
    assert rows[0] == "a-all-seed0,a,all,0,done,10,10,80.0,90.0,1.0,51.0,7.5,"
    study = read_study("studies/imagenet.py:sample_efficiency")
    outcomes = {run.name: scored(80.0 if run.row == "DeiT-S" else 60.0) for run in study.runs}
    assert "| ConViT-S over DeiT-S | -25.0% (+37.4%) |" in format_markdown(study, outcomes)
    write_tables(study, outcomes, tmp_path)
    text = (tmp_path / "table.tex").read_text()
    assert text.count("\\begin{table}") == text.count("\\end{tabular}") == 2  # top-1 and top-5
    assert "\\caption{Sample efficiency on ImageNet: top-1 (\\%) on the test images" in text
    assert "\\toprule\nmodel \\textbackslash{} fraction of each class & 5\\% & 10\\% &" in text
    assert "\\midrule\nConViT-S over DeiT-S & $-$25.0\\% (+37.4\\%) &" in text


def test_a_figure_appears_with_the_first_run(tmp_path):
    study = read_study("studies/digits.py:sample_efficiency")
    missing = {run.name: Outcome("to do") for run in study.runs}
    draw_study(study, missing, tmp_path)
    assert list(tmp_path.iterdir()) == []
    draw_study(study, missing | {study.runs[0].name: scored(50.0)}, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figure.pdf", "figure.png"]


@pytest.fixture
def panels(monkeypatch, tmp_path):
    """Gives the axes of a study's figure whose runs have the top-1 that a function gives."""

    def draw(source, top1):
        figures = []
        monkeypatch.setattr(figure, "save_figure", lambda made, *_: figures.append(made))
        study = read_study(f"studies/{source}")
        draw_study(study, {run.name: scored(top1(run)) for run in study.runs}, tmp_path)
        return figures[0].axes

    return draw


def has_line(axes, x, y):
    lines = [line.get_xydata() for line in axes.lines]
    expected = np.column_stack([x, y])
    return any(line.shape == expected.shape and np.allclose(line, expected) for line in lines)


def test_lines_are_means_by_fraction_and_their_gap(panels):
    means, gaps = panels(
        "digits.py:sample_efficiency",
        lambda run: 100 * run.column**0.5 * (1 if run.row == "DeiT" else 1.2) + (run.seed - 2),
    )
    fractions = np.array([0.02, 0.05, 0.1, 0.3, 1.0])
    for factor in (1, 1.2):
        assert has_line(means, fractions, 100 * fractions**0.5 * factor)
    assert has_line(gaps, fractions, np.full(5, 20))
    low, high = (np.asarray(cap.get_ydata(), float) for cap in means.containers[0].lines[1])
    np.testing.assert_allclose((high - low) / 2, np.full(5, 2.5**0.5))


def test_a_row_of_one_number_is_a_point_and_names_make_dots(panels):
    (axes,) = panels("digits.py:locality", lambda run: (40.0 if run.row == "no GPSA" else 60.0) + run.seed - 2)
    assert has_line(axes, [0], [40])
    assert has_line(axes, [1, 3, 5], [60, 60, 60])
    assert [text.get_text() for text in axes.get_legend().get_texts()][1] == "locality strength 0.01"
    (axes,) = panels("imagenet.py:ablations", lambda run: 50.0 if run.column == "all" else 20.0)
    assert has_line(axes, [50.0] * 7, range(7))
    assert has_line(axes, [59.7, 57.4, 56.9, 54.6, 47.8, 54.3, 44.8], range(7))  # the paper's
    assert axes.get_yticklabels()[1].get_text() == "b: gates fixed"
    assert axes.figure.legends[0].get_texts()[3].get_text() == "images of each class: 10%, paper"
