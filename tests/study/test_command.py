"""python -m convit_jax.study as a user starts it, with real runs that take a second once compiled."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import QUICK, ROOT, says

TINY = {"batch_size": 80, "steps": 120, "log_every": 5, "mesh.data": 1, "optim.warmup_epochs": 0.0} | {
    "model.embed_dim": 16,
    "model.num_heads": 4,
    "model.depth": 3,
    "model.local_up_to_layer": 2,
}


@pytest.fixture
def plan(make_study, tmp_path):
    """The file of a study of three runs, of which the second fails: a plan is no checkpoint."""
    rows = {"first": {}, "broken": {"init_from": str(tmp_path / "mine.py")}, "last": {}}
    make_study(*({"row": row, "overrides": TINY | own, "seeds": [0]} for row, own in rows.items()))
    return tmp_path / "mine.py"


def start(*arguments):
    environment = {**os.environ, "XLA_FLAGS": QUICK}
    command = [sys.executable, "-m", "convit_jax.study", *map(str, arguments)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


def pretend_done(run):
    run.mkdir(parents=True, exist_ok=True)
    line = {"step": 120, "epoch": 1.0, "val_top1": 50.0, "val_top5": 90.0, "val_loss": 1.0}
    for name, value in {"metrics.jsonl": line, "run.json": {"steps": 120}, "outcome.json": {"status": 0}}.items():
        (run / name).write_text(json.dumps(value) + "\n")


def states(output):
    lines = csv.DictReader((output / "table.csv").read_text().splitlines())
    return {line["run"].removesuffix("-seed0"): line["state"] for line in lines}


def test_a_study_survives_a_failure_and_a_signal_and_skips_what_is_done(plan, tmp_path):
    output = tmp_path / "out"
    pretend_done(output / "runs/first-seed0")
    process, metrics = start(plan, f"--output={output}"), output / "runs/last-seed0/metrics.jsonl"
    try:
        until = time.monotonic() + 300
        while not (metrics.exists() and "train_loss" in metrics.read_text()) and process.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=100)
    finally:
        process.kill()
    assert (process.returncode, errors) == (130, "")
    assert f"3 runs in {output}: 1 done, 2 to do" in printed
    assert "[2/3] broken-seed0: failed: cannot read " in printed
    assert "[3/3] last-seed0: stopped; the same command continues it" in printed
    again = f"python -m convit_jax.study {plan} --output={output}"
    assert f"2 of 3 runs, 1 failed; the same command continues:\n          {again}\n" in printed
    assert states(output) == {"first": "done", "broken": "failed", "last": "begun"}

    assert "Failed:\n\n- broken-seed0: cannot read " in (output / "table.md").read_text()

    pretend_done(output / "runs/broken-seed0")
    process = start(plan, f"--output={output}")
    printed, errors = process.communicate(timeout=300)
    assert (process.returncode, errors) == (0, "")
    assert "2 done, 1 begun" in printed
    assert "[3/3] last-seed0: top-1 " in printed
    assert "Continuing at step " in (output / "runs/last-seed0/output.log").read_text()
    assert not (output / "runs/first-seed0/output.log").exists()
    assert set(states(output).values()) == {"done"}
    assert json.loads((output / "runs/last-seed0/outcome.json").read_text())["status"] == 0
    assert (output / "figure.png").exists()


def test_a_mistake_is_one_sentence_before_anything_runs(plan, tmp_path):
    teacher = f"--config.distill.teacher={tmp_path}/none.pth"
    sentence = says("-m", "convit_jax.study", plan, f"--output={tmp_path}/out", teacher)
    assert sentence.startswith(f"study: run first-seed0: distill.teacher: there is no file or directory {tmp_path}")
    assert not (tmp_path / "out").exists()
