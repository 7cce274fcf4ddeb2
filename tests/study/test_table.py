"""Tables and figures of outcomes made up for the purpose."""

import csv
import dataclasses

import numpy as np
import pytest
from matplotlib.collections import PathCollection

from convit_jax.study import figure
from convit_jax.study.figure import draw
from convit_jax.study.plan import read_plan
from convit_jax.study.runner import Outcome
from convit_jax.study.table import markdown, relative_gap, write_tables

pytestmark = pytest.mark.filterwarnings("ignore:the load_module")  # ml_collections on Python 3.11

DONE = Outcome("done", 10, 10, {"top1": 50.0, "top5": 90.0, "loss": 1.0}, best=51.0, seconds=7.5)


def scored(top1):
    return dataclasses.replace(DONE, last=DONE.last | {"top1": top1})


def test_relative_gap_and_its_error():
    gap, error = relative_gap([12.0, 14.0], [10.0, 10.0])
    assert (gap, error) == (pytest.approx(30.0), pytest.approx(10.0))  # standard error of 13 is 1
    rng = np.random.default_rng(0)  # against the spread of the gap over many drawn studies
    numbers, baseline = rng.normal(60, 3, (20_000, 5)), rng.normal(40, 2, (20_000, 5))
    drawn = 100 * (numbers.mean(1) / baseline.mean(1) - 1)
    errors = [relative_gap(list(a), list(b))[1] for a, b in zip(numbers[:2000], baseline[:2000], strict=True)]
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(drawn.std(), rel=0.03)
    assert relative_gap([12.0], [10.0]) == (pytest.approx(20.0), None)
    assert relative_gap([], [10.0]) is None


def test_the_table_of_sample_efficiency():
    plan = read_plan("studies/digits.py:sample_efficiency", [])
    outcomes = {run.name: scored(60.0 + run.seed if run.row == "ConViT" else 50.0) for run in plan.runs}
    outcomes["convit-0.05-seed0"] = Outcome("failed", 3, 10, failure="no room")
    for seed in range(5):
        outcomes[f"deit-0.02-seed{seed}"] = Outcome("to do")
    lines = markdown(plan, outcomes).splitlines()
    assert "| model \\ fraction of each class | 2% | 5% | 10% | 30% | 100% |" in lines
    full, four = "62.00 ± 1.58", "62.50 ± 1.29 [n = 4]"
    assert f"| ConViT | {full} | {four} | {full} | {full} | {full} |" in lines
    assert "| DeiT | - | " + " | ".join(["50.00 ± 0.00"] * 4) + " |" in lines
    gap = "+24.0% ± 1.4%"
    assert f"| ConViT over DeiT | - | +25.0% ± 1.3% | {gap} | {gap} | {gap} |" in lines
    assert "- convit-0.05-seed0: no room" in lines
    assert "Not done yet: 5 of 50 runs." in lines


def test_the_papers_numbers_stand_beside_ours(tmp_path):
    plan = read_plan("studies/imagenet.py:ablations", ["--config.data.dir=x"])
    outcomes = {run.name: scored(80.0) for run in plan.runs}
    write_tables(plan, outcomes, tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert "| ablation \\ images of each class | all | 10% |" in text
    assert "| d: gates fixed, no convolutional init | 80.00 (81.6) | 80.00 (54.6) |" in text
    assert "seed 0; in brackets the paper's." in text
    assert "`python -m convit_jax.study studies/imagenet.py:ablations --config.data.dir=x`" in text
    rows = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert len(rows) == 14
    assert rows[0] == dict(
        run="a-all-seed0", row="a", column="all", seed="0", state="done", step="10", steps="10", top1="80.0"
    ) | dict(top5="90.0", loss="1.0", best_top1="51.0", seconds="7.5", failure="")


@pytest.mark.parametrize(
    "source",
    ["digits.py:sample_efficiency", "digits.py:locality", "imagenet.py:models", "imagenet.py:ablations"],
)
def test_a_figure_for_each_kind_of_plan_also_while_runs_are_missing(source, tmp_path):
    plan = read_plan(f"studies/{source}", [])
    missing = {run.name: Outcome("to do") for run in plan.runs}
    draw(plan, missing, tmp_path)
    assert list(tmp_path.iterdir()) == []
    draw(plan, missing | {plan.runs[0].name: scored(50.0)}, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figure.pdf", "figure.png"]


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """The Figure of a plan whose runs have the top-1 that a function gives."""

    def of(source, top1):
        figures = []
        monkeypatch.setattr(figure, "save", lambda made, stem: figures.append(made))
        plan = read_plan(f"studies/{source}", [])
        draw(plan, {run.name: scored(top1(run)) for run in plan.runs}, tmp_path)
        return figures[0]

    return of


def lines(panel):
    """The points of each line of a panel that has some."""
    return [line.get_xydata().tolist() for line in panel.lines if len(line.get_xydata())]


def test_the_lines_are_means_by_fraction_and_their_gap(drawn):
    means, gaps = drawn(
        "digits.py:sample_efficiency",
        lambda run: 100 * run.column**0.5 * (1 if run.row == "DeiT" else 1.2) + (run.seed - 2),
    ).axes
    fractions = [0.02, 0.05, 0.1, 0.3, 1.0]
    for factor in (1, 1.2):
        expected = [[f, 100 * f**0.5 * factor] for f in fractions]
        assert any(np.allclose(line, expected) for line in lines(means) if len(line) == 5)
    assert any(np.allclose(line, [[f, 20] for f in fractions]) for line in lines(gaps) if len(line) == 5)
    seeds = [each for each in means.collections if isinstance(each, PathCollection)]
    assert [len(of_row.get_offsets()) for of_row in seeds] == [25, 25]
    assert [label.get_text() for label in means.get_xticklabels()] == ["2%", "5%", "10%", "30%", "100%"]
    assert means.get_xlabel() == "fraction of each class\nbars: standard deviation over seeds"
    assert gaps.get_xlabel() == "fraction of each class\nbars: standard error"


def test_the_papers_lines_and_gap_stand_beside_ours(drawn):
    means, gaps = drawn("imagenet.py:sample_efficiency", lambda run: 50.0).axes
    assert means.get_xlabel() == gaps.get_xlabel() == "fraction of each class"  # one seed has no spread
    fractions = (0.05, 0.1, 0.3, 0.5, 1.0)
    theirs = {"DeiT-S": (34.8, 48.0, 66.1, 74.6, 79.9), "ConViT-S": (47.8, 59.6, 73.7, 78.2, 81.4)}
    for numbers in theirs.values():
        assert [list(point) for point in zip(fractions, numbers, strict=True)] in lines(means)
    of_paper = [100 * (a / b - 1) for a, b in zip(theirs["ConViT-S"], theirs["DeiT-S"], strict=True)]
    assert any(
        np.allclose(line, [*zip(fractions, of_paper, strict=True)]) for line in lines(gaps) if len(line) == 5
    )


def test_a_row_of_one_number_is_a_level_and_names_make_dots(drawn):
    (panel,) = drawn(
        "digits.py:locality", lambda run: (40.0 if run.row == "no GPSA" else 60.0) + run.seed - 2
    ).axes
    assert [[0, 40.0], [1, 40.0]] in lines(panel)  # in fractions of the axis
    assert [[1, 60.0], [3, 60.0], [5, 60.0]] in lines(panel)
    (band,) = panel.patches
    assert (band.get_y(), band.get_height()) == (pytest.approx(40 - 2.5**0.5), pytest.approx(2 * 2.5**0.5))
    assert panel.get_xlabel() == "number of GPSA layers\nbars and band: standard deviation over seeds"
    panels = drawn("imagenet.py:ablations", lambda run: 50.0 if run.column == "all" else 20.0).axes
    assert panels[0].get_xlim() == panels[1].get_xlim()
    assert panels[0].get_xlabel() == "top-1 (%)"
    assert [panel.get_title() for panel in panels] == [
        "images of each class: all",
        "images of each class: 10%",
    ]
    assert [[82.2, 0]] in lines(panels[0])  # the paper's of row a
    assert [[50.0, 0]] in lines(panels[0])
    assert [[44.8, 6]] in lines(panels[1])
