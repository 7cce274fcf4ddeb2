"""A run that is stopped, anywhere and anyhow, continues bit for bit."""

import functools
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, assert_same, run_train, saved

from convit_jax.errors import UserError
from convit_jax.rundir import lock_directory, read_metrics, wait_for_owner
from convit_jax.training import evaluation, loop
from convit_jax.training.loop import train
from convit_jax.training.metrics import SPEEDS


def curves(workdir):
    """metrics.jsonl without what depends on the clock."""
    lines = read_metrics(workdir / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in SPEEDS} for line in lines]


@pytest.fixture
def undisturbed(digits_config, train_once):
    """The config and the directory of a run of 12 steps that nothing stopped."""
    digits_config.augment.mixup = 0.8
    digits_config.model.drop_path_rate = 0.2
    digits_config.optim.ema_decay = 0.9
    return digits_config, train_once("undisturbed", digits_config)


@pytest.mark.parametrize("workers", [0, 2])
def test_stopped_at_any_step_and_continued_with_any_number_of_workers(undisturbed, tmp_path, workers):
    config, whole = undisturbed
    for step in (3, 7, 8):
        config.steps, config.data.workers = step, workers
        train(config, tmp_path / "parts")
    config.steps, config.data.workers = 12, 0
    train(config, tmp_path / "parts")
    assert_same(saved(whole), saved(tmp_path / "parts"))
    losses, of_parts = (
        {line["step"]: line["train_loss"] for line in curves(run) if "train_loss" in line}
        for run in (whole, tmp_path / "parts")
    )
    assert list(of_parts) == [3, 4, 7, 8, 12]  # at the end of a run its last, short window too
    assert losses.items() <= of_parts.items()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_the_next_start_continues(undisturbed, tmp_path, monkeypatch, capsys, name):
    config, whole = undisturbed
    put_batch, calls, before = loop.put_batch, [], signal.getsignal(signal.SIGINT)

    def put_and_signal(batch, mesh):
        calls.append(None)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.Signals[name])
        return put_batch(batch, mesh)

    monkeypatch.setattr(loop, "put_batch", put_and_signal)
    assert train(config, tmp_path / "stopped") is None
    assert f"Stopped by {name} at step 7, saved in" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.setattr(loop, "put_batch", put_batch)
    assert train(config, tmp_path / "stopped")["step"] == 12
    assert "Continuing at step 7" in capsys.readouterr().out
    assert_same(saved(whole), saved(tmp_path / "stopped"))
    assert curves(whole) == curves(tmp_path / "stopped")


def test_a_signal_at_an_evaluation_saves_first_and_evaluates_when_continued(
    undisturbed, tmp_path, monkeypatch
):
    config, _ = undisturbed
    config.eval_every = 4 * 80 / 1437  # after every fourth step
    train(config, tmp_path / "whole")
    put_batch, calls = loop.put_batch, []

    def put_and_signal(batch, mesh):
        calls.append(None)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return put_batch(batch, mesh)

    monkeypatch.setattr(loop, "put_batch", put_and_signal)
    train(config, tmp_path / "stopped")
    assert not any("val_top1" in line for line in curves(tmp_path / "stopped"))
    monkeypatch.setattr(loop, "put_batch", put_batch)
    train(config, tmp_path / "stopped")
    assert curves(tmp_path / "whole") == curves(tmp_path / "stopped")


def test_what_fails_in_an_evaluation_loses_no_step(digits_config, trained, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            train(digits_config, tmp_path / "broken")
    assert saved(tmp_path / "broken")["state"]["step"] == 12
    train(digits_config, tmp_path / "broken")
    assert curves(trained) == curves(tmp_path / "broken")


def test_an_evaluation_is_logged_only_when_its_weights_are_safe(digits_config, tmp_path, monkeypatch):
    def full(_):
        raise UserError("the disk is full")

    monkeypatch.setattr(loop.checkpoint, "wait", full)
    with pytest.raises(UserError, match="the disk is full"):
        train(digits_config, tmp_path)
    assert not any("val_top1" in line for line in curves(tmp_path))


def test_a_signal_during_an_evaluation_stops_it(digits_config, tmp_path, monkeypatch):
    digits_config.eval_batch_size = 20
    put_batch, seen = evaluation.put_batch, []

    def put_and_signal(batch, mesh):
        seen.append(None)
        if len(seen) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return put_batch(batch, mesh)

    monkeypatch.setattr(evaluation, "put_batch", put_and_signal)
    assert train(digits_config, tmp_path) is None
    assert len(seen) == 5 < 360 / 20
    assert saved(tmp_path)["state"]["step"] == 12
    assert train(digits_config, tmp_path)["step"] == 12
    assert "val_top1" in curves(tmp_path)[-1]


@pytest.mark.parametrize("lr", [0.008, 1e30])
def test_a_loader_that_a_signal_took_down_loses_no_line_and_saves_no_bad_state(
    digits_config, tmp_path, monkeypatch, lr
):
    digits_config.optim.lr = lr
    put_batch, calls = loop.put_batch, []

    def put_and_break(batch, mesh):
        calls.append(None)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
            raise RuntimeError("a worker process was terminated")
        return put_batch(batch, mesh)

    monkeypatch.setattr(loop, "put_batch", put_and_break)
    if lr == 1e30:
        with pytest.raises(UserError, match="stopped being finite"):
            train(digits_config, tmp_path)
        assert not list((tmp_path / "checkpoints").glob("[0-9]*"))
    else:
        assert train(digits_config, tmp_path) is None
        assert train(digits_config, tmp_path)["step"] == 12
        assert [line["step"] for line in curves(tmp_path)] == [0, 4, 8, 12, 12]


def test_fewer_steps_than_a_run_has_done_are_refused(digits_config, trained):
    digits_config.steps = 6
    with pytest.raises(UserError, match="is at step 12, beyond the 6 that it shall go"):
        train(digits_config, trained)


def test_two_runs_at_once_in_one_directory_are_refused(digits_config, trained):
    before = (trained / "config.json").read_text()
    digits_config.steps = 14
    with lock_directory(trained), pytest.raises(UserError, match="another process is training in"):
        train(digits_config, trained)
    assert (trained / "config.json").read_text() == before  # nothing of the other run was touched
    digits_config.steps = 12
    assert train(digits_config, trained)["step"] == 12


def test_a_process_that_has_another_directory_of_that_name_is_told(digits_config, tmp_path, monkeypatch):
    with lock_directory(tmp_path / "another", owner="another start"):
        pass
    monkeypatch.setattr(loop, "is_first", lambda: False)
    monkeypatch.setattr(loop, "wait_for_owner", functools.partial(wait_for_owner, seconds=0))
    for workdir in (tmp_path / "none", tmp_path / "another"):
        with pytest.raises(UserError, match=f"{workdir} is not the directory that process 0 writes to"):
            train(digits_config, workdir)


def test_killed_five_times_in_a_process_of_its_own_and_continued(digits_config, tmp_path):
    arguments = [
        f"--workdir={tmp_path / 'killed'}",
        "--config.steps=80",
        "--config.batch_size=80",
        "--config.model.embed_dim=18",
        "--config.model.depth=2",
        "--config.model.local_up_to_layer=1",
        "--config.checkpoint_every=3",
        "--config.log_every=2",
    ]
    environment = {**os.environ, "XLA_FLAGS": ""}  # compiled as a user's
    kills = sorted(np.random.default_rng().choice(np.arange(4, 70), 5, replace=False))
    print("kills at", kills)
    for number, kill_at in enumerate(kills):
        workers = 1 if number == 0 else 0
        command = [sys.executable, "train.py", *arguments, f"--config.data.workers={workers}"]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE)
        deadline = time.monotonic() + 120
        while not any(line["step"] >= kill_at for line in read_metrics(tmp_path / "killed/metrics.jsonl")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=30)  # ends when the loader's worker is gone as well
    assert run_train(*arguments, xla_flags="").returncode == 0
    arguments[0] = f"--workdir={tmp_path / 'whole'}"
    assert run_train(*arguments, xla_flags="").returncode == 0
    assert_same(saved(tmp_path / "whole"), saved(tmp_path / "killed"))
    assert curves(tmp_path / "whole") == curves(tmp_path / "killed")
