"""The directory of a study: whose runs it has, what became of each, and who works on it."""

import contextlib
import json
import signal

import pytest

from convit_jax.errors import UserError
from convit_jax.rundir import lock_directory, write_json
from convit_jax.study import __main__ as command
from convit_jax.study import runner
from convit_jax.study.runner import read_outcome, run_directory

LINE = {"step": 10, "val_top1": 50.0, "val_top5": 90.0, "val_loss": 1.0}


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out"


def begin(output, run):
    """Writes what train.py writes before the end of a run; returns its directory."""
    directory = run_directory(output, run)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "metrics.jsonl").write_text(json.dumps(LINE) + "\n")
    write_json(directory / "run.json", {"steps": 10})
    write_json(directory / "config.json", run.config.to_dict())
    return directory


def test_a_directory_belongs_to_the_configs_of_its_runs(make_study, output):
    directory = begin(output, make_study().runs[0])
    for study in (make_study({"seeds": [0, 1, 2]}), make_study(changes=["--config.data.workers=3"])):
        assert read_outcome(output, study.runs[0]).state == "begun"  # more runs; a field that changes no number
    for field, then in (("epochs", "100"), ("steps", "None"), ("distill.teacher", "None")):
        study = make_study(changes=[f"--config.{field}=3"])
        with pytest.raises(
            UserError, match=rf"a-seed0 holds a run .* \({field} was {then}, is '?3'?\): use another --output"
        ):
            command.write_results(study, output)
    (directory / "metrics.jsonl").unlink()
    assert read_outcome(output, study.runs[0]).state == "to do"  # train.py starts it over


def test_a_run_is_done_after_its_last_evaluation_and_a_good_exit(make_study, output):
    run = make_study().runs[0]
    directory = begin(output, run)
    for status, failure, state in ((1, "no room", "failed"), (143, None, "begun"), (0, None, "done")):
        write_json(directory / "outcome.json", {"status": status, "failure": failure, "seconds": 3.0})
        found = read_outcome(output, run)
        assert (found.state, found.failure, found.seconds) == (state, failure, 3.0)
    assert (found.last, found.best) == ({"top1": 50.0, "top5": 90.0, "loss": 1.0}, 50.0)
    write_json(directory / "run.json", {"steps": 20})  # stopped, with the checkpoint saved
    assert read_outcome(output, run).state == "begun"


def test_commands_share_the_runs(make_study, output, monkeypatch):
    study = make_study({"seeds": [0, 1, 2]})
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
    command.run_study(study, study.runs, output, [])
    assert trained == [1, 0]
    trained.clear()
    with lock_directory(directories[0], runner.LOCK):
        command.run_study(study, study.runs, output, [])
    assert trained == [1, 2]  # the failed one is tried again
    command.run_study(study, study.runs, output, [signal.SIGINT])
    assert trained == [1, 2]


def test_tables_are_written_when_the_figure_fails(make_study, tmp_path, monkeypatch, capsys):
    def fail(*arguments):
        raise ValueError("no such axis")

    monkeypatch.setattr(command, "draw_study", fail)
    assert set(command.write_results(make_study(), tmp_path)) == {"a-seed0", "a-seed1"}
    assert capsys.readouterr().out == "cannot draw the figure (no such axis); the tables are complete.\n"
    assert (tmp_path / "table.md").exists()
