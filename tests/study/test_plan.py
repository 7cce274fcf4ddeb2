"""The studies of the repository, and what a mistake in a study's file leads to."""

import json
import re

import pytest
from conftest import ROOT

from convit_jax.config import flatten
from convit_jax.errors import UserError
from convit_jax.models.variants import FAMILIES, settings_of
from convit_jax.study.plan import check_runs, read_study, select_runs
from convit_jax.study.runner import train_command

GOLDEN = ROOT / "tests/golden/convit_golden.pth"
SMALL = {"models": 12, "sample_efficiency": 2 * 5, "ablations": 7 * 2, "locality": 10, "distillation": 8}
STUDIES = {
    "digits.py": {name: 5 * runs for name, runs in SMALL.items()},
    "cifar10.py": {name: 3 * runs for name, runs in SMALL.items()} | {"sample_efficiency_cpu": 18, "ablations_cpu": 21},
    "imagenet.py": SMALL | {"locality_early": 10, "distillation": 3},
}


def settings(config):
    return settings_of(config.model, num_classes=10)


def by_row(source):
    return {run.row: run.config for run in read_study(f"studies/{source}").runs}


@pytest.mark.parametrize("file", list(STUDIES))
def test_studies_of_the_repository(file):
    text, docs = ((ROOT / path).read_text() for path in (f"studies/{file}", "docs/experiments.md"))
    assert f"python -m convit_jax.study studies/{file}:" in text
    documented = "".join(re.findall(rf"^\| (`studies/{file}:[^|]*) \|", docs, re.M))  # the first column
    for name, runs in STUDIES[file].items():
        study = read_study(f"studies/{file}:{name}")
        identities = {json.dumps(flatten(run.config)) for run in study.runs}
        assert len(study.runs) == len(identities) == runs
        assert all(settings(run.config) for run in study.runs)
        assert f":{name}" in text
        assert f":{name}`" in documented


@pytest.mark.parametrize("data", ["digits", "cifar10"])
def test_the_small_deit_is_a_deit_of_the_same_size(data):
    configs = by_row(f"{data}.py:sample_efficiency")
    convit, deit = settings(configs["ConViT"]), settings(configs["DeiT"])
    assert convit | FAMILIES["deit"] == deit
    for section in ("optim", "augment", "data"):
        assert configs["ConViT"][section].to_dict() == configs["DeiT"][section].to_dict()


def test_a_change_reaches_every_run_and_its_command(make_study, tmp_path):
    study = make_study({"overrides": {"epochs": 3}}, changes=["--config.epochs=7"])
    assert [(run.config.epochs, run.config.seed) for run in study.runs] == [(7, 0), (7, 1)]
    command = train_command(study.runs[1], tmp_path)
    assert command[-3:] == ["--config.epochs=7", "--config.seed=1", f"--workdir={tmp_path}/runs/a-seed1"]


@pytest.mark.parametrize(
    ("entries", "keys", "sentence"),
    [
        (
            [{}],
            {"titel": ""},
            r"cannot read the plan .*/mine.py \(TypeError: .*'titel'(\. Did you mean 'title'\?)?\): .* lists all keys",
        ),
        ([{}, {}], {}, "two runs have the same row, column and seed"),
        ([{}], {"baseline": "b"}, r"baseline \['b'\]: choose from \[None, 'a'\]"),
        ([{"overrides": {"optim.lrr": 1}}], {}, "the config has no field 'optim.lrr'"),
    ],
)
def test_a_mistake_in_a_study_is_named(entries, keys, sentence, make_study):
    with pytest.raises(UserError, match=sentence):
        make_study(*entries, **keys)


def test_a_part_of_a_study_or_a_sentence():
    study = read_study("studies/digits.py:locality")
    part = select_runs(study, row=["0.01", "no GPSA"], column=["0", "5"], seed=["1"])
    assert [run.name for run in part] == ["no-gpsa-0-seed1", "locality-strength-0.01-5-seed1"]
    assert select_runs(study, row=None, column=None, seed=None) == list(study.runs)
    no_row = "the study has no row 'no-GPSA', did you mean 'no GPSA'? The rows are: no GPSA, 0.01, 0.1, 1."
    with pytest.raises(UserError, match=f"^{re.escape(no_row)}$"):
        select_runs(study, row=["no-GPSA"])
    with pytest.raises(UserError, match="the study has no run with these rows, columns and seeds: see --list"):
        select_runs(study, row=["1"], column=["0"])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"model.num_heads": 7}, "num_heads 7"),
        ({"init_from": "none.pth"}, "none.pth"),
        ({"optim.frozen": ("gates",)}, "optim.frozen has 'gates'"),
        ({"distill.teacher": str(GOLDEN), "data.num_classes": 9}, str(GOLDEN)),
    ],
)
def test_every_run_is_checked_before_the_first(overrides, words, make_study):
    with pytest.raises(UserError, match=f"^run b-seed0: .*{re.escape(words)}"):
        check_runs(make_study({}, {"row": "b", "overrides": overrides}).runs)


def test_a_config_file_of_the_user_comes_before_the_repository(make_study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = "from configs.digits import get_config as base\n\ndef get_config():\n    config = base()\n"
    (tmp_path / "own.py").write_text(own + "    config.epochs = 7\n    return config\n")
    study = make_study({"config": "own.py"}, {"row": "b"})
    assert [run.config.epochs == 7 for run in study.runs] == [True, False, True, False]
