"""The directory of a study: whose it is, what became of each run, and who works on it."""

import contextlib
import json
import signal

import pytest

from convit_jax.errors import UserError
from convit_jax.rundir import lock_directory
from convit_jax.study import __main__ as command
from convit_jax.study import runner
from convit_jax.study.runner import claim_study, read_outcome, run_directory

LARGER = {"seeds": [0, 1, 2]}


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out"


def test_a_directory_belongs_to_one_study_which_may_grow(make_study, output):
    claim_study(output, make_study())
    claim_study(output, make_study(changes=["--config.data.workers=3"]))  # changes no number
    claim_study(output, make_study(LARGER))
    for study, difference in (
        (make_study(LARGER, changes=["--config.epochs=3"]), "epochs was 100, is 3"),
        (make_study(LARGER, changes=["--config.steps=3"]), "steps was None, is 3"),
        (make_study(LARGER, changes=["--config.distill.teacher=x"]), "distill.teacher was None, is 'x'"),
        (make_study(), "it has no run a-seed2"),
    ):
        with pytest.raises(UserError, match=rf"out holds another study, .*/mine.py \({difference}\): use another"):
            claim_study(output, study)
    older = json.loads((output / "study.json").read_text())
    for fields in older["runs"].values():
        del fields["optim.clip_norm"]  # a field that older code did not have
        fields["eval_every"] = 7  # and one that it counted
    (output / "study.json").write_text(json.dumps(older))
    claim_study(output, make_study(LARGER))


def test_a_run_is_done_after_its_last_evaluation_and_a_good_exit(tmp_path):
    line = {"step": 10, "val_top1": 50.0, "val_top5": 90.0, "val_loss": 1.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "run.json").write_text('{"steps": 10}')
    assert read_outcome(tmp_path).state == "begun"
    for status, failure, state in ((1, "no room", "failed"), (143, None, "begun"), (0, None, "done")):
        record = {"status": status, "failure": failure, "seconds": 3.0, "at": 1.0}
        (tmp_path / "outcome.json").write_text(json.dumps(record))
        found = read_outcome(tmp_path)
        assert (found.state, found.failure, found.seconds) == (state, failure, 3.0)
    assert (found.last, found.best) == ({"top1": 50.0, "top5": 90.0, "loss": 1.0}, 50.0)
    (tmp_path / "run.json").write_text('{"steps": 20}')  # stopped, with the checkpoint saved
    assert read_outcome(tmp_path).state == "begun"


def test_commands_share_the_runs(make_study, output, monkeypatch):
    study = make_study(LARGER)
    directories = [run_directory(output, run) for run in study.runs]
    trained = []

    def train(run, output, signals, show):
        trained.append(run.seed)
        if held:  # another command takes the run, fails with seed 2 and stops
            directories[2].mkdir(exist_ok=True)
            (directories[2] / "outcome.json").write_text(json.dumps({"status": 1, "failure": "no room"}))
            held.pop().close()

    monkeypatch.setattr(runner, "run_training", train)
    held = [contextlib.ExitStack()]
    held[0].enter_context(lock_directory(directories[0]))  # train.py's lock: its command was killed
    command.run_study(study, output, [])
    assert trained == [1, 0]
    trained.clear()
    with lock_directory(directories[0], runner.LOCK):
        command.run_study(study, output, [])
    assert trained == [1, 2]  # the failed one is tried again
    command.run_study(study, output, [signal.SIGINT])
    assert trained == [1, 2]


def test_tables_are_written_when_the_figure_fails(make_study, tmp_path, monkeypatch, capsys):
    def fail(*arguments):
        raise ValueError("no such axis")

    monkeypatch.setattr(command, "draw_study", fail)
    assert set(command.write_results(make_study(), tmp_path)) == {"a-seed0", "a-seed1"}
    assert capsys.readouterr().out == "cannot draw the figure (no such axis); the tables are complete.\n"
    assert (tmp_path / "table.md").exists()
