"""What a run learns, logs and leaves behind, and what stops it."""

import json
import shutil
from types import SimpleNamespace

import pytest
from conftest import assert_same, run_python, saved

from configs import finetune
from convit_jax.data import loader
from convit_jax.errors import UserError
from convit_jax.rundir import read_metrics
from convit_jax.training import memory, setup
from convit_jax.training.loop import train
from convit_jax.weights.pretrained import load


def on_folder(config, folder, **fields):
    """A config for an image folder of 18 training and 6 test images: three steps an epoch."""
    config.data.name, config.data.dir = "folder", str(folder)
    config.batch_size, config.eval_batch_size, config.model.image_size = 6, 4, (8, 12)
    config.update(fields)
    return config


def test_what_a_run_leaves_behind(tmp_path):
    run = tmp_path / "run"
    small = ["--config.model.depth=2", "--config.model.local_up_to_layer=1", "--config.model.embed_dim=18"]
    done = run_python("train.py", f"--workdir={run}", "--config.steps=4", "--config.log_every=2", *small)
    assert done.returncode == 0, done.stderr
    facts = json.loads((run / "run.json").read_text())
    assert (facts["steps"], facts["images"]) == (4, 512)
    assert facts["flops"] == 2 * facts["macs"] > 0
    assert f"{facts['parameters']:,} parameters" in done.stdout
    assert "augment.policy=none" in done.stdout
    assert "Compiling the training step, up to a minute the first time ...\nFirst step after" in done.stdout
    assert json.loads((run / "config.json").read_text())["batch_size"] == 128
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "tensorboard").glob("events*"))
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 2, 4, 4]
    looks = {"gates", "centre_x", "centre_y", "span", "nonlocality"}
    rates = {"train_loss", "train_top1", "lr", "images_per_second", "data_wait"}
    results = {"val_top1", "val_top5", "val_loss"}
    for line, values in zip(lines, (looks, rates, rates, results | looks), strict=True):
        assert set(line) == {"step", "epoch"} | values
    assert all(0 <= line["data_wait"] <= 1 < line["images_per_second"] < 1e5 for line in lines[1:3])
    summary = done.stdout[done.stdout.index("Done: ") :]
    last = lines[-1]
    assert summary.startswith(f"Done: top-1 {last['val_top1']:.2f}  top-5 {last['val_top5']:.2f}")
    for name in ("checkpoints", "curves", "TensorBoard", "evaluate", "predict", "visualize", "convert"):
        assert f"  {name} " in summary


def test_a_linear_probe_of_a_run_is_of_its_network_and_changes_the_head_alone(trained, tmp_path, capsys):
    start = load(trained)
    config = finetune.get_config()
    config.data.name, config.mesh.data = "digits", 1
    config.init_from, config.optim.freeze, config.steps = str(trained), "backbone", 2
    train(config, tmp_path / "probe")
    end = load(tmp_path / "probe")
    assert end.preprocessing == start.preprocessing
    params = start.params(), end.params()
    head, trained_head = (each.pop("head")["kernel"] for each in params)
    assert (head != trained_head).all()
    assert_same(*params)
    shutil.rmtree(trained)  # the run goes on without them
    config.steps = 3
    train(config, tmp_path / "probe")
    assert "Continuing at step 2" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(digits_config, tmp_path):
    digits_config.checkpoint_every, digits_config.steps = 2, 4
    train(digits_config, tmp_path)
    good = saved(tmp_path)
    config_file = tmp_path / "config.json"
    config_file.write_text(config_file.read_text().replace('"lr": 0.008', '"lr": 1e+30'))
    digits_config.optim.lr, digits_config.steps = 1e30, 12
    with pytest.raises(UserError, match=r"not finite at step 6; step 4 is saved .* lower optim.lr"):
        train(digits_config, tmp_path)
    assert_same(good, saved(tmp_path))


def test_it_learns_an_image_folder_with_one_compilation_and_evaluates_the_average_too(
    digits_config, image_folder, tmp_path, monkeypatch
):
    traces, make = [], setup.make_train_step

    def counted(*args):
        step = make(*args)
        return lambda *inputs, **fixed: (traces.append(None), step(*inputs, **fixed))[1]

    monkeypatch.setattr(setup, "make_train_step", counted)
    config = on_folder(digits_config, image_folder, epochs=20, steps=None)
    config.augment.crop, config.optim.lr = "resized", 0.3
    config.optim.ema_decay = 0.9
    last = train(config, tmp_path / "run")
    assert len(traces) == 1
    assert last["val_top1"] > 99
    assert {"val_ema_top1", "val_ema_top5", "val_ema_loss"} <= set(last)
    assert last["val_loss"] != last["val_ema_loss"]


def test_unreadable_images_are_named_and_counted_until_there_are_too_many(
    digits_config, image_folder, tmp_path, capsys
):
    config = on_folder(digits_config, image_folder, checkpoint_every=1)
    (image_folder / "train/bee/3.jpg").write_bytes(b"not an image")
    (image_folder / "val/cat/1.jpg").write_bytes(b"")
    last = train(config, tmp_path / "run")
    printed = capsys.readouterr().out
    assert printed.count("bee/3.jpg") == 1
    assert printed.count("cat/1.jpg") == 1
    assert last["step"] == 6
    assert last["val_top1"] in [pytest.approx(100 * hits / 5) for hits in range(6)]  # of 6 images
    assert read_metrics(tmp_path / "run/metrics.jsonl")[-2]["unreadable_images"] == 1

    (image_folder / "train/ant/2.jpg").write_bytes(b"")
    config.data.max_unreadable = 1
    with pytest.raises(UserError, match=r"\.jpg .* than data\.max_unreadable=1 allows"):
        train(config, tmp_path / "too many")
    assert not list((tmp_path / "too many/checkpoints").glob("[4-9]*"))


def test_a_run_needs_shared_memory_for_training_and_evaluation_together(digits_config, monkeypatch, tmp_path):
    digits_config.data.workers, digits_config.eval_batch_size, digits_config.steps = 2, 80, 20
    free = 12 * 80 * 8 * 8 * 3  # training takes nine batches, evaluation five
    monkeypatch.setattr(loader.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    monkeypatch.setattr(loader, "SHARED_MEMORY", tmp_path)
    with pytest.raises(UserError, match=r"the workers of the loaders need .* lower data\.workers"):
        train(digits_config, tmp_path / "run")


def test_a_step_that_needs_more_memory_than_is_free_is_said(digits_config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "free_host_memory", lambda: 1e6)
    digits_config.steps = 1
    train(digits_config, tmp_path)
    (caution,) = [line for line in capsys.readouterr().out.splitlines() if "Caution" in line]
    assert "GiB are free: lower batch_size, raise accumulate, or set model.remat=True" in caution


def test_a_limit_of_a_container_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "GROUPS", tmp_path)
    limits = {"max": "1000", "current": "700", "stat": "anon 600\ninactive_file 50"}
    for name, text in limits.items():
        (tmp_path / f"memory.{name}").write_text(text + "\n")
    assert memory.free_host_memory() == 350
    (tmp_path / "memory.max").write_text("max\n")
    assert 1e6 < memory.free_host_memory() < float("inf")
