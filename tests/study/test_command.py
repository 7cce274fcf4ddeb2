"""python -m convit_jax.study as a user starts it, with real runs that take a second once compiled."""

import csv
import json
import signal

import pytest
from conftest import QUICK, TINY, python_process, wait_until

from convit_jax.errors import UserError


@pytest.fixture
def plan(make_study, tmp_path):
    """The file of a study of three runs, of which the second fails: a plan is no checkpoint."""
    rows = {"first": {}, "broken": {"init_from": str(tmp_path / "mine.py")}, "last": {}}
    fields = TINY | {"steps": 80, "log_every": 5}
    make_study(*({"row": row, "overrides": fields | own, "seeds": [0]} for row, own in rows.items()))
    return str(tmp_path / "mine.py")


@pytest.fixture
def study(run_here, plan, tmp_path, monkeypatch):
    """Runs the command in this process; returns its exit status and what it prints."""
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)

    def run(*flags):
        done = run_here("study/__main__", plan, f"--output={tmp_path}/out", *flags)
        return done.returncode, done.stdout

    return run


def pretend_done(run):
    run.mkdir(parents=True, exist_ok=True)
    line = {"step": 80, "epoch": 1.0, "val_top1": 50.0, "val_top5": 90.0, "val_loss": 1.0}
    for name, value in {"metrics.jsonl": line, "run.json": {"steps": 80}, "outcome.json": {"status": 0}}.items():
        (run / name).write_text(json.dumps(value) + "\n")


def states(output):
    lines = csv.DictReader((output / "table.csv").read_text().splitlines())
    return {line["run"].removesuffix("-seed0"): line["state"] for line in lines}


def test_a_study_survives_a_failure_and_a_signal_and_skips_what_is_done(plan, study, tmp_path, monkeypatch):
    output = tmp_path / "out"
    pretend_done(output / "runs/first-seed0")
    metrics = output / "runs/last-seed0/metrics.jsonl"
    with python_process("-m", "convit_jax.study", plan, f"--output={output}") as process:
        wait_until(lambda: metrics.exists() and "train_loss" in metrics.read_text(), process)
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=300)
    assert (process.returncode, errors) == (130, "")
    assert f"runs in {output}: 1 done, 2 to do" in printed
    assert "[2/3] broken-seed0: failed: cannot read " in printed
    assert "[3/3] last-seed0: stopped; the same command continues it" in printed
    assert "2 of 3 runs, 1 failed; the same command continues\n" in printed
    assert "Failed:\n\n- broken-seed0: cannot read " in printed
    assert states(output) == {"first": "done", "broken": "failed", "last": "begun"}

    status, printed = study("--rows=first")
    assert status == 0
    assert f"runs in {output}: 1 done" in printed
    pretend_done(output / "runs/broken-seed0")
    monkeypatch.setenv("XLA_FLAGS", QUICK)
    status, printed = study()
    assert status == 0
    assert "2 done, 1 begun" in printed
    assert "[3/3] last-seed0: top-1 " in printed
    assert "Continuing at step " in (output / "runs/last-seed0/output.log").read_text()
    assert not (output / "runs/first-seed0/output.log").exists()
    assert set(states(output).values()) == {"done"}
    assert (output / "figure.png").exists()


def test_a_list_and_a_mistake_leave_no_directory(study, tmp_path):
    status, printed = study("--list", "--seeds=0")
    assert status == 0
    assert "# last-seed0\npython " in printed
    with pytest.raises(UserError, match=r"^run first-seed0: distill\.teacher: there is no file or directory none"):
        study("--config.distill.teacher=none")
    with pytest.raises(UserError, match="expected PLAN, got"):
        study("another.py")
    assert not (tmp_path / "out").exists()
