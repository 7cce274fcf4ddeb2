"""A run that is stopped, anywhere and anyhow, continues bit for bit."""

import errno
import functools
import os
import re
import shutil
import signal

import numpy as np
import pytest
from conftest import SPEEDS, assert_same, python_process, run_python, saved, wait_until

from convit_jax.errors import UserError
from convit_jax.rundir import checkpoint_steps, lock_directory, read_metrics, wait_for_owner
from convit_jax.training import evaluation, loop, setup
from convit_jax.training.checkpoint import Checkpoints
from convit_jax.training.loop import train
from convit_jax.training.stop import Stop
from convit_jax.weights.run import reading


def curves(workdir):
    """metrics.jsonl without what depends on the clock."""
    lines = read_metrics(workdir / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in SPEEDS} for line in lines]


@pytest.fixture
def undisturbed(digits_config, train_once):
    """The config and the directory of a run that nothing stopped: 12 steps, an evaluation after every fourth."""
    digits_config.eval_every, digits_config.eval_batch_size = 4 * 80 / 1437, 40
    digits_config.augment.mixup = 0.8
    digits_config.model.drop_path_rate = 0.2
    digits_config.optim.ema_decay = 0.9
    return digits_config, train_once("undisturbed", digits_config)


@pytest.fixture
def signal_at(monkeypatch):
    """A function: sends a signal to this process with the n-th batch of the training, or of an evaluation."""
    put_batch = loop.put_batch

    def signal_at(count, number=signal.SIGTERM, module=loop):
        seen = []

        def put_and_signal(batch, mesh):
            seen.append(None)
            if len(seen) == count:
                os.kill(os.getpid(), number)
            return put_batch(batch, mesh)

        monkeypatch.setattr(module, "put_batch", put_and_signal)
        return seen

    return signal_at


def test_signals_save_and_the_same_command_continues(undisturbed, tmp_path, signal_at, capsys):
    config, whole = undisturbed
    run, before = tmp_path / "stopped", signal.getsignal(signal.SIGINT)
    signal_at(4)  # SIGTERM with the last batch before an evaluation: first save, evaluate when continued
    assert train(config, run) is None
    assert "Stopped by SIGTERM at step 4, saved in" in capsys.readouterr().out
    assert checkpoint_steps(run) == [4]
    seen = signal_at(5, signal.SIGINT, evaluation)  # in the middle of that evaluation
    assert train(config, run) is None
    assert len(seen) == 5 < 360 / 40
    assert not any("val_top1" in line for line in curves(run))
    signal_at(3, signal.SIGHUP)
    config.data.workers = 1
    assert train(config, run) is None
    assert "Stopped by SIGHUP at step 7, saved in" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is before
    config.data.workers = 0
    assert train(config, run)["step"] == 12
    assert "Continuing at step 7" in capsys.readouterr().out
    assert_same(saved(whole), saved(run))
    assert curves(whole) == curves(run)


def test_a_second_interrupt_ends_at_once():
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.poll(1) == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_what_fails_in_an_evaluation_loses_no_step(digits_config, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("out of memory")

    def full(_):
        raise UserError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", broken)
        with pytest.raises(RuntimeError, match="out of memory"):
            train(digits_config, tmp_path / "broken")
    assert checkpoint_steps(tmp_path / "broken")[-1] == 12
    with monkeypatch.context() as patch:  # the log must not describe weights that are lost
        patch.setattr(Checkpoints, "wait", full)
        with pytest.raises(UserError, match="the disk is full"):
            train(digits_config, tmp_path / "broken")
    assert not any("val_top1" in line for line in curves(tmp_path / "broken"))


def test_a_directory_in_use_and_fewer_steps_than_done_are_refused(digits_config, trained):
    before = (trained / "config.json").read_text()
    digits_config.steps = 14
    with lock_directory(trained), pytest.raises(UserError, match=r"another process is training in .*: wait until"):
        train(digits_config, trained)
    assert (trained / "config.json").read_text() == before  # nothing of the other run was changed
    digits_config.steps = 6
    with pytest.raises(UserError, match="is at step 12, beyond its end at 6"):
        train(digits_config, trained)
    digits_config.steps = 12
    assert train(digits_config, trained)["step"] == 12


def test_a_process_with_another_directory_of_that_name_is_told(digits_config, tmp_path, monkeypatch):
    with lock_directory(tmp_path / "another", owner="another start"):
        pass
    monkeypatch.setattr(setup, "is_first", lambda: False)
    monkeypatch.setattr(setup, "wait_for_owner", functools.partial(wait_for_owner, seconds=0))
    for workdir in (tmp_path / "none", tmp_path / "another"):
        with pytest.raises(UserError, match=f"{workdir} is not the directory that process 0 writes to"):
            train(digits_config, workdir)


def test_killed_in_its_own_process_and_continued(tmp_path):
    model = {"embed_dim": 18, "depth": 2, "local_up_to_layer": 1}
    fields = {"steps": 30, "batch_size": 80, "checkpoint_every": 3, "log_every": 2}
    fields |= {f"model.{name}": value for name, value in model.items()}
    arguments = [f"--config.{name}={value}" for name, value in fields.items()]
    killed, whole = (f"--workdir={tmp_path}/{name}" for name in ("killed", "whole"))
    kill_at = np.random.default_rng().integers(4, 24)
    print("kill at", kill_at)
    command, log = ["train.py", *arguments], tmp_path / "killed/metrics.jsonl"
    with python_process(*command, killed, "--config.data.workers=1", xla_flags="") as process:  # compiled as a user's
        wait_until(lambda: any(line["step"] >= kill_at for line in read_metrics(log)), process)
        process.kill()
        process.communicate(timeout=300)  # ends when the loader's worker is gone as well
    for workdir in (killed, whole):
        assert run_python(*command, workdir, xla_flags="").returncode == 0
    assert_same(saved(tmp_path / "whole"), saved(tmp_path / "killed"))
    assert curves(tmp_path / "whole") == curves(tmp_path / "killed")


def test_a_damaged_checkpoint_is_set_aside_for_an_earlier_one(trained, digits_config, capsys):
    checkpoints, latest = trained / "checkpoints", max(checkpoint_steps(trained))
    shutil.copytree(checkpoints / str(latest), checkpoints / str(latest - 1))
    (checkpoints / str(latest) / "state/_METADATA").unlink()
    digits_config.steps = latest + 1
    train(digits_config, trained)
    said = capsys.readouterr().out
    assert re.search(rf"cannot read {checkpoints}/{latest} \(.*\)\nContinuing at step {latest - 1}\n", said)
    assert max(checkpoint_steps(trained)) == latest + 1
    assert [path.name for path in sorted(trained.glob("damaged/*/*"))] == [str(latest), "metrics.jsonl"]
    for step in checkpoint_steps(trained):
        (checkpoints / str(step) / "state/_METADATA").unlink()
    with pytest.raises(UserError, match=r"cannot read .*: restore a copy, return"):
        train(digits_config, trained)


def test_what_the_system_cannot_read_now_stays_in_its_place(trained, digits_config):
    latest = max(checkpoint_steps(trained))
    manifest = trained / f"checkpoints/{latest}/state/manifest.ocdbt"
    manifest.unlink()
    manifest.symlink_to(manifest)  # an error of the system, which TensorStore reports as text
    with pytest.raises(UserError, match=rf"cannot read .*/{latest} \(.*{os.strerror(errno.ELOOP)}\): it may be whole"):
        train(digits_config, trained)
    assert max(checkpoint_steps(trained)) == latest
    for error in (OSError(errno.EIO, "Input/output error"), MemoryError(), RuntimeError("can't start new thread")):
        with pytest.raises(UserError, match=r"cannot read .* \(.+\): it may be whole"), reading(trained):
            raise error
    with pytest.raises(KeyboardInterrupt), reading(trained):
        raise Exception("Encountered error while reading array index") from KeyboardInterrupt()
