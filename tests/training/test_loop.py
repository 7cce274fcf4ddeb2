"""A run that is stopped, anywhere and anyhow, continues bit for bit; what a run leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, assert_same, run_train, saved

from convit_jax.data import loader
from convit_jax.errors import UserError
from convit_jax.training import loop
from convit_jax.training.loop import train
from convit_jax.training.metrics import read_metrics
from convit_jax.training.rundir import hold


def curves(workdir):
    """metrics.jsonl without what depends on the clock."""
    lines = read_metrics(workdir / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "data_wait")} for line in lines]


@pytest.fixture
def undisturbed(digits_config, tmp_path):
    """The config and the directory of a run of 12 steps that nothing stopped."""
    digits_config.augment.mixup = 0.8
    digits_config.model.drop_path_rate = 0.2
    digits_config.optim.ema_decay = 0.9
    train(digits_config, tmp_path / "undisturbed")
    return digits_config, tmp_path / "undisturbed"


@pytest.mark.parametrize("workers", [0, 2])
def test_stopped_at_any_step_and_continued_with_any_number_of_workers(undisturbed, tmp_path, workers):
    config, whole = undisturbed
    for step in (3, 7, 8):
        config.steps, config.data.workers = step, workers
        train(config, tmp_path / "parts")
    config.steps, config.data.workers = 12, 0
    train(config, tmp_path / "parts")
    assert_same(saved(whole), saved(tmp_path / "parts"))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_the_next_start_continues(undisturbed, tmp_path, monkeypatch, capsys, name):
    config, whole = undisturbed
    put_batch, calls = loop.put_batch, []

    def put_and_signal(batch, mesh):
        calls.append(None)
        if len(calls) == 7:
            os.kill(os.getpid(), signal.Signals[name])
        return put_batch(batch, mesh)

    monkeypatch.setattr(loop, "put_batch", put_and_signal)
    assert train(config, tmp_path / "stopped") is None
    assert f"Stopped by {name} at step 7, saved in" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
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


def test_a_signal_during_an_evaluation_stops_it(digits_config, tmp_path, monkeypatch):
    digits_config.eval_batch_size = 20
    put_batch, seen = loop.put_batch, []

    def put_and_signal(batch, mesh):
        if "valid" in batch:
            seen.append(None)
            if len(seen) == 5:
                os.kill(os.getpid(), signal.SIGTERM)
        return put_batch(batch, mesh)

    monkeypatch.setattr(loop, "put_batch", put_and_signal)
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
        assert [line["step"] for line in curves(tmp_path)] == [4, 8, 12, 12]


def test_the_training_step_is_compiled_once(digits_config, tmp_path, monkeypatch):
    steps = []
    make = loop.make_train_step

    def counted(*args):
        step = make(*args)

        def traced(*inputs):
            steps.append(None)
            return step(*inputs)

        return traced

    monkeypatch.setattr(loop, "make_train_step", counted)
    train(digits_config, tmp_path)
    assert len(steps) == 1


def test_fewer_steps_than_a_run_has_done_are_refused(digits_config, tmp_path):
    train(digits_config, tmp_path)
    digits_config.steps = 6
    with pytest.raises(UserError, match="is at step 12, beyond the 6 that it shall go"):
        train(digits_config, tmp_path)


def test_two_runs_at_once_in_one_directory_are_refused(digits_config, tmp_path):
    train(digits_config, tmp_path)
    with hold(tmp_path), pytest.raises(UserError, match="another process is training in"):
        train(digits_config, tmp_path)
    assert train(digits_config, tmp_path)["step"] == 12


def test_oblong_images(digits_config, image_folder, tmp_path):
    digits_config.data.name, digits_config.data.dir = "folder", str(image_folder)
    digits_config.batch_size, digits_config.eval_batch_size, digits_config.steps = 6, 4, 2
    digits_config.model.image_size = (12, 18)
    assert train(digits_config, tmp_path / "run")["step"] == 2


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
        f"--config.compilation_cache={tmp_path / 'compiled'}",
    ]
    environment = {**os.environ, "XLA_FLAGS": ""}
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
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=30)  # ends when the loader's worker is gone as well
    assert run_train(*arguments).returncode == 0
    arguments[0] = f"--workdir={tmp_path / 'whole'}"
    assert run_train(*arguments).returncode == 0
    assert_same(saved(tmp_path / "whole"), saved(tmp_path / "killed"))
    assert curves(tmp_path / "whole") == curves(tmp_path / "killed")


def test_a_disk_that_fills_while_logging_is_said_and_the_run_does_not_hang(tmp_path):
    script = f"""
import resource, signal, sys
sys.path[:0] = {[str(ROOT), str(ROOT / "tests")]!r}
import conftest
from pathlib import Path
from convit_jax.errors import UserError
from convit_jax.training.metrics import MetricsLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
log = MetricsLog(Path({str(tmp_path)!r}), 0)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    for step in range(5000):
        log.write(step, 0.0, dict(train_loss=1.0, lr=0.1))
except UserError as error:
    log.close()
    print("said:", error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert "said: cannot write" in done.stdout, done.stdout + done.stderr
    assert "Make room" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(digits_config, tmp_path):
    digits_config.checkpoint_every = 2
    digits_config.steps = 4
    train(digits_config, tmp_path)
    good = saved(tmp_path)
    config_file = tmp_path / "config.json"
    config_file.write_text(config_file.read_text().replace('"lr": 0.008', '"lr": 1e+30'))
    digits_config.optim.lr, digits_config.steps = 1e30, 12
    with pytest.raises(UserError, match=r"stopped being finite at step 6; step 4 is saved") as error:
        train(digits_config, tmp_path)
    assert "lower optim.lr" in str(error.value)
    assert_same(good, saved(tmp_path))


@pytest.mark.parametrize("eval_batch_size", [360, 77, 1000])
def test_evaluation_is_exact_at_any_batch_size(digits_config, tmp_path, eval_batch_size):
    from flax import nnx

    from convit_jax import create_model
    from convit_jax.data.augment import normalize
    from convit_jax.data.sources import Digits
    from convit_jax.training.plan import model_arguments

    digits_config.eval_batch_size = eval_batch_size
    result = train(digits_config, tmp_path)
    graphdef, _ = nnx.split(create_model(**model_arguments(digits_config, 10)))
    model = nnx.merge(graphdef, saved(tmp_path)["state"]["params"])
    digits = Digits("test")
    logits = np.asarray(model(normalize(digits.images, digits_config.data.mean, digits_config.data.std)))
    order = np.argsort(-logits, axis=1)
    label_logit = logits[np.arange(360), digits.labels]
    assert result["val_top1"] == 100 * np.sum(order[:, 0] == digits.labels) / 360
    assert result["val_top5"] == 100 * np.sum(order[:, :5] == digits.labels[:, None]) / 360
    loss = np.mean(np.log(np.exp(logits).sum(1)) - label_logit)
    np.testing.assert_allclose(result["val_loss"], loss, rtol=1e-5)


def test_what_a_run_leaves_behind(digits_config, tmp_path, capsys):
    result = train(digits_config, tmp_path)
    printed = capsys.readouterr().out
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["steps"] == 12
    assert run["images"] == 960
    assert run["flops"] == 2 * run["macs"] > 0
    assert f"{run['parameters']:,} parameters" in printed
    assert "0.00125 at its peak" in printed
    assert "optim.weight_decay=0.05" in printed
    assert json.loads((tmp_path / "config.json").read_text())["batch_size"] == 80
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "tensorboard").glob("events*"))
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [4, 8, 12, 12]
    assert set(lines[0]) == {
        "step",
        "epoch",
        "train_loss",
        "train_top1",
        "lr",
        "images_per_second",
        "data_wait",
    }
    assert set(lines[-1]) == {"step", "epoch", "val_top1", "val_top5", "val_loss"}
    assert lines[-1] == result
    for name in ("checkpoints", "curves", "TensorBoard", "next"):
        assert f"  {name} " in printed


def test_a_finished_run_started_again_says_what_came_out(digits_config, tmp_path, capsys):
    first = train(digits_config, tmp_path)
    capsys.readouterr()
    assert train(digits_config, tmp_path) == first
    assert f"Done: top-1 {first['val_top1']:.2f}" in capsys.readouterr().out


def test_the_moving_average_is_evaluated_beside_the_weights(undisturbed):
    last = curves(undisturbed[1])[-1]
    assert {"val_top1", "val_ema_top1", "val_ema_loss"} <= set(last)
    assert last["val_loss"] != last["val_ema_loss"]


def test_it_learns_an_image_folder(digits_config, image_folder, tmp_path):
    digits_config.data.name, digits_config.data.dir = "folder", str(image_folder)
    digits_config.augment.crop = "resized"
    digits_config.model.image_size = 16
    digits_config.batch_size, digits_config.eval_batch_size = 6, 4
    digits_config.optim.lr = 0.3
    digits_config.epochs, digits_config.steps = 20, None
    assert train(digits_config, tmp_path / "run")["val_top1"] > 99


def test_an_unreadable_image_stops_the_run_by_name_and_what_was_saved_stays(
    digits_config, image_folder, tmp_path
):
    digits_config.data.name, digits_config.data.dir = "folder", str(image_folder)
    digits_config.batch_size, digits_config.eval_batch_size = 6, 4
    (image_folder / "train/bee/3.jpg").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"bee/3\.jpg"):
        train(digits_config, tmp_path / "run")


def test_the_loader_of_a_run_draws_only_the_images_of_its_subset(digits_config, tmp_path, monkeypatch):
    digits_config.data.sampling_ratio, digits_config.data.num_classes = 0.1, 4
    digits_config.batch_size, digits_config.eval_batch_size = 8, 16
    seen, decode = set(), loader.decode

    def spy(record, name):
        seen.add(name)
        return decode(record, name)

    monkeypatch.setattr(loader, "decode", spy)
    train(digits_config, tmp_path)
    assert {name.split("/")[0] for name in seen} == {"0", "1", "2", "3"}
    assert json.loads((tmp_path / "run.json").read_text())["train_images"] == sum(
        int(count * 0.1) for count in np.bincount(loader_labels())[:4]
    )


def loader_labels():
    """Labels of all training digits."""
    from convit_jax.data.sources import Digits

    return Digits("train").labels
