"""The plans in studies/, and what is said of a plan with a mistake in it."""

import dataclasses
import json
import signal
import types

import pytest
from conftest import ROOT
from huggingface_hub import constants

from convit_jax.errors import UserError
from convit_jax.models.variants import FAMILIES, model_settings
from convit_jax.study import __main__ as command
from convit_jax.study.__main__ import next_run
from convit_jax.study.plan import check, read_plan
from convit_jax.study.runner import Signals, claim, folder, outcome, take, train_command
from convit_jax.training.plan import model_arguments

pytestmark = pytest.mark.filterwarnings("ignore:the load_module")  # ml_collections on Python 3.11

GOLDEN = ROOT / "tests/golden/convit_golden.pth"
ENTRY = {"row": "a", "config": "configs/digits.py", "seeds": [0, 1]}
WHOLE = {"title": "Two", "question": "Do they differ?", "rows": "model", "runs": [ENTRY]}


def settings(run):
    return model_settings(**model_arguments(run.config, 10))


def written(tmp_path, plan, changes=()):
    """A Plan of a dict, by way of a file."""
    (tmp_path / "mine.py").write_text(f"def get_plan():\n    return {plan!r}\n")
    return read_plan(str(tmp_path / "mine.py"), list(changes))


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
def test_a_plan_has_its_runs_and_names_its_command(source, runs):
    plan = read_plan(f"studies/{source}", [])
    assert len(plan.runs) == runs
    assert (
        len({tuple(sorted((k, str(v)) for k, v in run.config.to_dict().items())) for run in plan.runs})
        == runs
    )
    assert all(settings(run) for run in plan.runs)
    file, _, name = source.partition(":")
    text = (ROOT / "studies" / file).read_text()
    assert f"python -m convit_jax.study studies/{file}:" in text
    assert f":{name}" in text


@pytest.mark.parametrize("data", ["digits", "cifar10"])
def test_the_small_deit_is_a_deit_of_the_same_size(data):
    runs = {run.row: run for run in read_plan(f"studies/{data}.py:sample_efficiency", []).runs}
    convit, deit = settings(runs["ConViT"]), settings(runs["DeiT"])
    assert {name for name in deit if deit[name] != convit[name]} == {*FAMILIES["deit"]}
    assert {name: deit[name] for name in FAMILIES["deit"]} == FAMILIES["deit"]
    fields = runs["ConViT"].config, runs["DeiT"].config
    for section in ("optim", "augment", "data"):
        assert fields[0][section].to_dict() == fields[1][section].to_dict()


def test_table_2_shows_as_many_images_on_every_fraction():
    for run in read_plan("studies/imagenet.py:sample_efficiency", []).runs:
        assert run.config.data.keep_total_images
        assert run.config.data.sampling_ratio == run.column


def test_the_early_accuracy_of_fig_8_is_that_of_the_whole_schedule():
    whole, early = (
        [run.config.to_dict() for run in read_plan(f"studies/imagenet.py:{name}", []).runs]
        for name in ("locality", "locality_early")
    )
    assert [config["epochs"] for config in early] == [300] * 10
    assert early == [config | {"steps": 2539} for config in whole]  # 20 epochs of 130,000 images


def test_the_small_ablations_change_what_those_of_the_paper_change():
    small = {run.row: run.config for run in read_plan("studies/digits.py:ablations", []).runs}
    large = {run.row: run.config for run in read_plan("studies/imagenet.py:ablations", []).runs}
    for row in "abcdfg":
        for field in ("gate_init", "conv_init"):
            assert small[row].model[field] == large[row].model[field]
        assert small[row].optim.frozen == large[row].optim.frozen
    assert settings_of(small["e"])["local_up_to_layer"] == settings_of(large["e"])["local_up_to_layer"] == 0


def settings_of(config):
    return model_settings(**model_arguments(config, 10))


def test_a_change_on_the_command_line_reaches_every_run_and_its_command(tmp_path):
    plan = written(tmp_path, WHOLE, ["--config.epochs=7"])
    assert [run.config.epochs for run in plan.runs] == [7, 7]
    assert [run.config.seed for run in plan.runs] == [0, 1]
    command = train_command(plan.runs[1], tmp_path)
    assert command[-3:] == ["--config.epochs=7", "--config.seed=1", f"--workdir={tmp_path}/runs/a-seed1"]


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        (WHOLE | {"titel": ""}, "sets 'titel', did you mean 'title'?"),
        ({"title": "x"}, "lacks 'question'. A plan has title, question, rows, runs"),
        (WHOLE | {"runs": [{"row": "a", "seeds": [0]}]}, "lacks 'config'. A run has row, column, config"),
        (WHOLE | {"runs": [ENTRY, ENTRY]}, "has two runs a-seed0: give each row, column and seed once"),
        (WHOLE | {"baseline": "b"}, "has the baseline 'b', which is none of its rows"),
        (WHOLE | {"scale": "logs"}, "has the scale 'logs': choose of linear, log, fraction"),
        (
            WHOLE | {"columns": "x", "scale": "log", "runs": [ENTRY | {"column": 1}, ENTRY | {"column": 0}]},
            "has the scale 'log' and the column 0: it takes numbers above 0",
        ),
        (
            WHOLE | {"columns": "x", "scale": "fraction", "runs": [ENTRY | {"column": "all"}]},
            "has the scale 'fraction' and the column 'all': it takes numbers above 0",
        ),
        (WHOLE | {"metrics": ["top2"]}, "has the metric 'top2': choose of top1, top5, loss"),
        (
            WHOLE | {"runs": [{**ENTRY, "overrides": {"optim.lrr": 1}}]},
            "run a-seed0: the config has no field 'optim.lrr', did you mean 'optim.lr'?",
        ),
        (
            WHOLE | {"runs": [{**ENTRY, "overrides": {"epochs": "many"}}]},
            "run a-seed0: flag --config.epochs=many: invalid literal",
        ),
        (
            WHOLE | {"runs": [{**ENTRY, "config": "configs/digit.py"}]},
            "run a-seed0: there is no config file 'configs/digit.py', did you mean 'configs/digits.py'?",
        ),
    ],
)
def test_a_mistake_in_a_plan_is_named(plan, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as raised:
        written(tmp_path, plan)
    assert sentence in str(raised.value)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"model.num_heads": 7}, "embed_dim 72 is not a multiple of num_heads 7"),
        ({"data.sampling_ratio": 0.001}, "data.sampling_ratio 0.001 leaves no image of class 0"),
        ({"data.name": "folder"}, "data.name is folder but data.dir is empty"),
        ({"data.num_classes": 11}, "data.num_classes is 11, but the data has 10 classes"),
        ({"data.subset_rule": "any"}, "data.subset_rule is 'any': choose first or random"),
        ({"optim.schedule_per": "day"}, "optim.schedule_per is 'day': choose epoch or step"),
        ({"distill.kind": "firm"}, "distill.kind is 'firm': choose hard or soft"),
        ({"init_from": "none.pth"}, "there is no file or directory none.pth"),
        ({"optim.frozen": ("gates",)}, "optim.frozen has 'gates', which names no parameter of "),
        ({"distill.teacher": "runs/a/none"}, "distill.teacher: there is no file or directory runs/a/none"),
        ({"distill.teacher": "runs/none"}, "distill.teacher: there is no file or directory runs/none"),
        ({"distill.teacher": "empty"}, "distill.teacher: the run in empty has saved no checkpoint yet"),
        (
            {"distill.teacher": str(GOLDEN), "data.num_classes": 9},
            f"distill.teacher: {GOLDEN} tells 10 classes apart and does not say which, but the data has 9",
        ),
    ],
)
def test_what_cannot_be_is_named_before_the_first_run_also_of_the_second(
    overrides, sentence, tmp_path, monkeypatch
):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    second = ENTRY | {"row": "b", "overrides": overrides}
    with pytest.raises(UserError) as raised:
        check(written(tmp_path, WHOLE | {"runs": [ENTRY, second]}))
    assert str(raised.value).startswith(f"run b-seed0: {sentence}")


def test_the_work_of_a_run_is_what_it_shows_and_no_more(tmp_path):
    rows = {
        "all": {"epochs": 2},
        "half": {"epochs": 2, "data.sampling_ratio": 0.5},
        "as many": {"epochs": 2, "data.sampling_ratio": 0.5, "data.keep_total_images": True},
        "cap": {"epochs": 2, "steps": 3},
        "cap above": {"epochs": 2, "steps": 10_000},
    }
    batch = {"batch_size": 80}
    runs = [{**ENTRY, "seeds": [0], "row": row, "overrides": {**own, **batch}} for row, own in rows.items()]
    work = check(written(tmp_path, WHOLE | {"runs": runs}))
    steps = {name: of_run / work["cap-seed0"] * 3 for name, of_run in work.items()}
    assert steps["all-seed0"] == steps["as-many-seed0"] == steps["cap-above-seed0"] == 36
    assert steps["half-seed0"] == 18


def test_a_config_is_found_beside_the_user_and_else_in_the_clone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text("from configs.digits import get_config\n")
    runs = [ENTRY | {"config": "own.py", "seeds": [0]}, ENTRY | {"row": "b", "seeds": [0]}]
    own, ours = written(tmp_path, WHOLE | {"runs": runs}).runs
    assert own.flags[0] == "--config=own.py"
    assert (tmp_path / ours.flags[0].removeprefix("--config=")).resolve() == ROOT / "configs/digits.py"


def test_a_directory_belongs_to_one_plan_which_may_grow(tmp_path):
    output = tmp_path / "out"
    claim(output, written(tmp_path, WHOLE))
    claim(output, written(tmp_path, WHOLE, ["--config.data.workers=3"]))  # changes no number
    larger = WHOLE | {"runs": [{**ENTRY, "seeds": [0, 1, 2]}]}
    claim(output, written(tmp_path, larger))
    for plan, changes, sentence in (
        (larger, ["--config.epochs=3"], "(epochs was 100, is 3): give another --output"),
        (larger, ["--config.steps=3"], "(steps was None, is 3): give another --output"),
        (larger, ["--config.distill.teacher=x"], "(distill.teacher was None, is 'x'): give another --output"),
        (WHOLE, [], "(its run a-seed2 is not in this plan): give another --output"),
    ):
        with pytest.raises(UserError) as raised:
            claim(output, written(tmp_path, plan, changes))
        assert sentence in str(raised.value)
    assert str(raised.value).startswith(f"{output} holds another plan, {tmp_path}/mine.py ")
    older = json.loads((output / "study.json").read_text())
    for fields in older["runs"].values():
        del fields["optim.clip_norm"]  # as if the code of then had had none,
        fields["eval_every"] = 7  # and had counted this
    (output / "study.json").write_text(json.dumps(older))
    claim(output, written(tmp_path, larger))


def test_a_run_directory_of_another_config_is_refused(tmp_path):
    plan, output = written(tmp_path, WHOLE), tmp_path / "out"
    config = dataclasses.replace(plan.runs[0]).config.copy_and_resolve_references()
    config.optim.lr = 0.5
    folder(output, plan.runs[0]).mkdir(parents=True)
    (folder(output, plan.runs[0]) / "config.json").write_text(config.to_json_best_effort())
    with pytest.raises(
        UserError, match=r"runs/a-seed0 holds a run with another config \(optim.lr was 0.5, is"
    ):
        claim(output, plan)


def test_the_directory_of_a_run_is_refused_and_left_as_it_is(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"run is the directory of a run of train.py, not of a study: give an"
    ):
        claim(tmp_path / "run", written(tmp_path, WHOLE))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    "name", ["study.json", "runs/a-seed0/config.json", "runs/a-seed0/run.json", "runs/a-seed0/outcome.json"]
)
@pytest.mark.parametrize("damage", [b"", b'{"seconds": 3', b"\xff\xff"])
def test_a_damaged_file_is_named_and_may_be_removed(name, damage, tmp_path):
    plan, output = written(tmp_path, WHOLE), tmp_path / "out"
    (output / "runs/a-seed0").mkdir(parents=True)
    (output / name).write_bytes(damage)

    def look():
        claim(output, plan)
        return outcome(output, plan.runs[0]).state

    with pytest.raises(UserError) as raised:
        look()
    assert str(raised.value).startswith(f"{output / name} is damaged (")
    assert "remove it and start the same command again" in str(raised.value)
    (output / name).unlink()
    assert look() == "to do"


def test_commands_share_the_runs_and_do_not_repeat_each_others_failures(tmp_path):
    plan, output = written(tmp_path, WHOLE), tmp_path / "out"
    claim(output, plan)
    first = take(output, plan.runs[0])
    assert take(output, plan.runs[0]) is None
    run, now, ours, others = next_run(plan, output, lambda run, now: now.state == "to do")
    assert (run.name, now.state, others) == ("a-seed1", "to do", 1)
    assert next_run(plan, output, lambda run, now: True) == (None, None, None, 2)
    ours.release()
    first.release()
    record = {"failure": "no room", "seconds": 3.0, "at": 1.0}
    (folder(output, plan.runs[0]) / "outcome.json").write_text(json.dumps(record))
    failed = outcome(output, plan.runs[0])
    assert (failed.state, failed.failure, failed.seconds, failed.failed_at) == ("failed", "no room", 3.0, 1.0)


def test_a_run_is_done_when_its_last_checkpoint_is_there_or_its_process_said_so(tmp_path):
    run, output = written(tmp_path, WHOLE).runs[0], tmp_path / "out"
    where = folder(output, run)
    (where / "checkpoints/9").mkdir(parents=True)
    line = {"step": 10, "val_top1": 50.0, "val_top5": 90.0, "val_loss": 1.0}
    (where / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (where / "run.json").write_text('{"steps": 10}')
    assert outcome(output, run).state == "begun"  # it is saving
    for status, state in ((1, "failed"), (-9, "failed"), (0, "done")):
        failure = "no room" if status else None
        record = {"status": status, "failure": failure, "seconds": 3.0, "at": 1.0}
        (where / "outcome.json").write_text(json.dumps(record))
        assert outcome(output, run).state == state
    (where / "outcome.json").unlink()
    (where / "checkpoints/10").mkdir()
    assert (outcome(output, run).state, outcome(output, run).last["top1"]) == ("done", 50.0)


def test_a_signal_reaches_a_run_once_whenever_it_comes():
    sent = []
    process = types.SimpleNamespace(send_signal=sent.append)
    with Signals() as signals:
        signal.raise_signal(signal.SIGTERM)  # while it is being started
        signals.process = process
        signals.forward()
        assert sent == [signal.SIGTERM]
        signal.raise_signal(signal.SIGINT)  # before it is looked whether one came
        signals.forward()
    assert sent == [signal.SIGTERM, signal.SIGINT]
    assert signals.number == signal.SIGTERM


def test_a_figure_that_fails_is_said_and_the_tables_are_written(tmp_path, monkeypatch, capsys):
    def fails(*arguments):
        raise ValueError("no such axis")

    monkeypatch.setattr(command, "draw", fails)
    plan = written(tmp_path, WHOLE)
    assert set(command.write(plan, tmp_path)) == {"a-seed0", "a-seed1"}
    assert capsys.readouterr().out == "the figure cannot be drawn, the tables are there: no such axis\n"
    assert (tmp_path / "table.md").exists()
