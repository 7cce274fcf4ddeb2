"""The studies of the repository, and what a mistake in a study's file leads to."""

import json

import pytest
from conftest import ROOT
from huggingface_hub import constants

from convit_jax.errors import UserError
from convit_jax.models.variants import FAMILIES, model_settings
from convit_jax.study.plan import check_study, read_study, run_identity
from convit_jax.study.runner import train_command
from convit_jax.training.plan import model_arguments

GOLDEN = ROOT / "tests/golden/convit_golden.pth"
ENTRY = {"row": "a", "config": "configs/digits.py", "seeds": [0, 1]}
WHOLE = {"title": "Two", "question": "Do they differ?", "rows": "model", "runs": [ENTRY]}
COLUMNS = WHOLE | {"columns": "x", "scale": "log"}


@pytest.fixture
def make_study(tmp_path):
    """Makes a Study of a dict, through a file."""

    def make(plan=WHOLE, changes=()):
        (tmp_path / "mine.py").write_text(f"def get_plan():\n    return {plan!r}\n")
        return read_study(str(tmp_path / "mine.py"), list(changes))

    return make


def settings(config):
    return model_settings(**model_arguments(config, 10))


def by_row(source):
    return {run.row: run.config for run in read_study(f"studies/{source}").runs}


@pytest.mark.parametrize(
    ("source", "runs"),
    [
        ("digits.py:sample_efficiency", 2 * 5 * 5),
        ("digits.py:ablations", 7 * 2 * 5),
        ("digits.py:locality", 10 * 5),
        ("digits.py:models", 12 * 5),
        ("digits.py:distillation", 8 * 5),
        ("cifar10.py:sample_efficiency", 2 * 5 * 3),
        ("cifar10.py:sample_efficiency_cpu", 2 * 3 * 3),
        ("cifar10.py:ablations", 7 * 2 * 3),
        ("cifar10.py:ablations_cpu", 7 * 3),
        ("cifar10.py:locality", 10 * 3),
        ("cifar10.py:models", 12 * 3),
        ("cifar10.py:distillation", 8 * 3),
        ("imagenet.py:models", 12),
        ("imagenet.py:sample_efficiency", 2 * 5),
        ("imagenet.py:ablations", 7 * 2),
        ("imagenet.py:locality", 10),
        ("imagenet.py:locality_early", 10),
        ("imagenet.py:distillation", 3),
    ],
)
def test_studies_of_the_repository(source, runs):
    study = read_study(f"studies/{source}")
    identities = {json.dumps(run_identity(run.config), sort_keys=True) for run in study.runs}
    assert len(study.runs) == len(identities) == runs
    assert all(settings(run.config) for run in study.runs)
    file, _, name = source.partition(":")
    text = (ROOT / "studies" / file).read_text()
    assert f"python -m convit_jax.study studies/{file}:" in text
    assert f":{name}" in text
    assert f"`studies/{source}`" in (ROOT / "docs/studies.md").read_text()


@pytest.mark.parametrize("data", ["digits", "cifar10"])
def test_the_small_deit_is_a_deit_of_the_same_size(data):
    configs = by_row(f"{data}.py:sample_efficiency")
    convit, deit = settings(configs["ConViT"]), settings(configs["DeiT"])
    assert {name for name in deit if deit[name] != convit[name]} == {*FAMILIES["deit"]}
    assert {name: deit[name] for name in FAMILIES["deit"]} == FAMILIES["deit"]
    for section in ("optim", "augment", "data"):
        assert configs["ConViT"][section].to_dict() == configs["DeiT"][section].to_dict()


def test_table_2_shows_as_many_images_on_every_fraction():
    for run in read_study("studies/imagenet.py:sample_efficiency").runs:
        assert run.config.data.keep_total_images
        assert run.config.data.sampling_ratio == run.column
    for run in read_study("studies/digits.py:sample_efficiency").runs:
        assert run.config.optim.warmup_epochs == 5 / run.column


def test_the_early_accuracy_of_fig_8_is_that_of_the_whole_schedule():
    whole, early = (
        [run.config.to_dict() for run in read_study(f"studies/imagenet.py:{name}").runs]
        for name in ("locality", "locality_early")
    )
    assert [config["epochs"] for config in early] == [300] * 10
    assert early == [config | {"steps": 2539} for config in whole]  # 20 epochs of 130,000 images


def test_the_small_ablations_change_what_those_of_the_paper_change():
    small, large = by_row("digits.py:ablations"), by_row("imagenet.py:ablations")
    for row in "abcdfg":
        for field in ("gate_init", "conv_init"):
            assert small[row].model[field] == large[row].model[field]
        assert small[row].optim.frozen == large[row].optim.frozen
    assert settings(small["e"])["local_up_to_layer"] == settings(large["e"])["local_up_to_layer"] == 0


def test_a_change_reaches_every_run_and_its_command(make_study, tmp_path):
    study = make_study(WHOLE | {"runs": [ENTRY | {"overrides": {"epochs": 3}}]}, ["--config.epochs=7"])
    assert [(run.config.epochs, run.config.seed) for run in study.runs] == [(7, 0), (7, 1)]
    command = train_command(study.runs[1], tmp_path)
    assert command[-3:] == ["--config.epochs=7", "--config.seed=1", f"--workdir={tmp_path}/runs/a-seed1"]


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        (WHOLE | {"titel": ""}, "sets 'titel', did you mean 'title'?"),
        ({"title": "x"}, "lacks 'question'. It must have title, question, rows, runs"),
        (WHOLE | {"runs": [{"row": "a", "seeds": [0]}]}, "lacks 'config'. It must have row, config, seeds"),
        (WHOLE | {"columns": "x"}, "lacks 'column'"),
        (WHOLE | {"runs": [ENTRY, ENTRY]}, "has two runs a-seed0: list each row and column once"),
        (WHOLE | {"baseline": "b"}, "has the baseline 'b': choose from None, a"),
        (WHOLE | {"scale": "logs"}, "has the scale 'logs': choose from linear, log, fraction"),
        (COLUMNS | {"runs": [ENTRY | {"column": 0}]}, "has the scale 'log' and the column 0: use numbers"),
        (COLUMNS | {"runs": [ENTRY | {"column": "all"}]}, "has the scale 'log' and the column 'all': use"),
        (WHOLE | {"metrics": ["top2"]}, "has the metric 'top2': choose from top1, top5, loss"),
        (
            WHOLE | {"runs": [{**ENTRY, "overrides": {"optim.lrr": 1}}]},
            "run a-seed0: the config has no field",
        ),
        (WHOLE | {"runs": [{**ENTRY, "overrides": {"epochs": "many"}}]}, "run a-seed0: flag --config.epochs"),
        (WHOLE | {"runs": [{**ENTRY, "config": "configs/digit.py"}]}, "did you mean 'configs/digits.py'?"),
    ],
)
def test_a_mistake_in_a_study_is_named(plan, sentence, make_study, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as raised:
        make_study(plan)
    assert sentence in str(raised.value)


@pytest.mark.parametrize(
    ("source", "changes", "sentence"),
    [
        ("studies/digit.py", [], "there is no plan 'studies/digit.py', did you mean 'studies/digits.py'?"),
        ("studies/digits.py", [], "say which study of the file, as FILE.py:NAME; it has models, sample_eff"),
        ("README.md", [], "cannot read the plan README.md ("),
        ("studies/digits.py:models", ["--config.seed=1"], "--config.seed is not possible here"),
        ("studies/digits.py:models", ["--config.epochs"], "flag --config.epochs"),
    ],
)
def test_a_mistake_in_the_command_is_named(source, changes, sentence, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as raised:
        read_study(source, changes)
    assert sentence in str(raised.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"model.num_heads": 7}, "num_heads 7"),
        ({"data.sampling_ratio": 0.001}, "data.sampling_ratio 0.001"),
        ({"data.name": "folder"}, "data.dir"),
        ({"data.num_classes": 11}, "data.num_classes is 11"),
        ({"optim.schedule_per": "day"}, "optim.schedule_per is 'day'"),
        ({"init_from": "none.pth"}, "none.pth"),
        ({"optim.frozen": ("gates",)}, "optim.frozen has 'gates'"),
        ({"distill.teacher": "runs/a/none"}, "distill.teacher: there is no file or directory runs/a/none"),
        ({"distill.teacher": "empty"}, "distill.teacher: the run in empty has"),
        ({"distill.teacher": str(GOLDEN), "data.num_classes": 9}, f"distill.teacher: {GOLDEN}"),
    ],
)
def test_every_run_is_checked_before_the_first(overrides, words, make_study, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    with pytest.raises(UserError) as raised:
        check_study(make_study(WHOLE | {"runs": [ENTRY, ENTRY | {"row": "b", "overrides": overrides}]}))
    assert str(raised.value).startswith("run b-seed0: ")
    assert words in str(raised.value)


def test_a_config_file_of_the_user_comes_before_the_repository(make_study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = "from configs.digits import get_config as base\n\ndef get_config():\n    config = base()\n"
    (tmp_path / "own.py").write_text(own + "    config.epochs = 7\n    return config\n")
    study = make_study(WHOLE | {"runs": [ENTRY | {"config": "own.py"}, ENTRY | {"row": "b"}]})
    assert [run.config.epochs == 7 for run in study.runs] == [True, False, True, False]
