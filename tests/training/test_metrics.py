"""The log of a run and the line that people watch."""

import io
import re
import shutil

import pytest
from tensorboardX.proto.event_pb2 import Event

from convit_jax.config import load_config
from convit_jax.rundir import read_metrics
from convit_jax.training import metrics
from convit_jax.training.metrics import Clock, MetricsLog, Progress, duration
from convit_jax.training.summary import peak_flops

VALUES = {
    "train_loss": 1.23456,
    "train_top1": 61.5,
    "lr": 5e-4,
    "images_per_second": 1234.5,
    "data_wait": 0.02,
}


def test_lines_of_steps_that_are_done_again_are_dropped(tmp_path):
    log = MetricsLog(tmp_path, 0, {})
    for step in (2, 4, 6):
        log.write(step, step / 10, {"train_loss": float(step)})
    log.write(4, 0.4, {"val_top1": 50.0})
    log.close()
    log = MetricsLog(tmp_path, 4, {})
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [2, 4, 4]
    assert log.top1 == {4: 50.0}
    assert log.last == {"step": 4, "epoch": 0.4, "val_top1": 50.0}
    log.close()


def test_values_of_layers_and_heads_come_back_from_the_log_and_go_to_tensorboard_one_by_one(tmp_path):
    gates = [[0.7311, 0.1], [0.0, 1.0]]
    log = MetricsLog(tmp_path, 0, {})
    log.write(4, 0.4, {"val_top1": 50.0, "gates": gates})
    log.close()
    (board,) = tmp_path.glob("tensorboard/events*")
    values = {value.tag: value.simple_value for event in events(board) for value in event.summary.value}
    assert values == pytest.approx(
        {
            "val_top1": 50.0,
            "gates/layer_1/mean": 0.41555,
            "gates/layer_1/head_1": 0.7311,
            "gates/layer_1/head_2": 0.1,
            "gates/layer_2/mean": 0.5,
            "gates/layer_2/head_1": 0.0,
            "gates/layer_2/head_2": 1.0,
        }
    )
    log = MetricsLog(tmp_path, 4, {})
    assert log.last == {"step": 4, "epoch": 0.4, "val_top1": 50.0, "gates": gates}
    log.close()


def events(path):
    """The events of a TensorBoard file: length (8 bytes), its checksum (4), the event, its checksum (4)."""
    content = path.read_bytes()
    while content:
        end = 12 + int.from_bytes(content[:8], "little")
        yield Event.FromString(content[12:end])
        content = content[end + 4 :]


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "epoch": 0.1}\n{"step": 2, "epo{"step": 2, "epoch": 0.2}\n{"step": 3}\n{"st')
    assert read_metrics(path) == [{"step": 1, "epoch": 0.1}, {"step": 3}]
    assert read_metrics(tmp_path / "none.jsonl") == []


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    return now


def test_a_file_gets_plain_lines(clock):
    stream = io.StringIO()
    progress = Progress(1000, 0, stream)
    progress.first_step(12.34)
    clock[0] += 99
    progress.update(100, 2.5, VALUES)
    progress.update(100, 2.5, VALUES | {"mfu": 0.4251})
    progress.evaluated(100, 2.5, {"val_top1": 61.23456})
    assert stream.getvalue().splitlines() == [
        "First step after 12.3 s, compilation included",
        "step 100/1000  epoch 2.5  loss 1.2346  top-1 61.5  lr 5.00e-04  1234 img/s  data 2%  left 15:00",
        "step 100/1000  epoch 2.5  loss 1.2346  top-1 61.5  lr 5.00e-04  1234 img/s  MFU 43%  data 2%"
        "  left 15:00",
        "step 100/1000  epoch 2.5  val_top1 61.2346",
    ]


@pytest.mark.parametrize(
    ("device_kind", "dtype", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA L40", "bfloat16", None),
        ("TPU v5 lite", "bfloat16", 197e12),
        ("NVIDIA H200", "float32", None),
        ("cpu", "bfloat16", None),
    ],
)
def test_the_peak_of_a_device_is_known_by_its_name(device_kind, dtype, flops):
    assert peak_flops(device_kind, dtype) == flops


@pytest.mark.filterwarnings("ignore:the load_module")  # ml_collections on Python 3.11
def test_the_command_for_your_own_images_starts_from_weights_of_its_own_model():
    stream = io.StringIO()
    Progress(9, 0, stream).finished({"val_top1": 1.0, "val_top5": 2.0, "val_loss": 3.0}, "run", "curves.png")
    config = load_config(re.search(r"train\.py (.*) with FOLDER/train", stream.getvalue())[1].split())
    assert config.init_from == config.model.name
    assert (config.data.name, config.data.dir, config.model.image_size) == ("folder", "FOLDER", 224)


@pytest.mark.parametrize("columns", [60, 100, 140])
def test_a_terminal_gets_one_live_line_that_fits(clock, monkeypatch, columns):
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: type("Size", (), {"columns": columns}))
    stream = Terminal()
    progress = Progress(1000, 0, stream)
    progress.update(100, 2.5, VALUES)
    progress.update(500, 12.5, VALUES)
    progress.update(900, 22.5, VALUES | {"mfu": 0.4251})
    progress.say("done")
    parts = re.split(r"\r\x1b\[K", stream.getvalue())
    assert parts[0] == ""
    assert parts[-1] == "done\n"
    for part in parts[1:-1]:
        assert "\n" not in part
        assert len(part) < columns
    assert ("####" in parts[2]) == (columns == 140)
    assert "step 500/1000" in parts[2]
    assert "left " in parts[2]
    assert ("lr " in parts[2]) == (columns >= 100)
    assert ("MFU 43%" in parts[3]) == (columns >= 100)


def test_the_clock_counts_what_is_done_and_not_the_pauses(clock):
    timer = Clock()
    for _ in range(4):
        with timer.waiting():
            clock[0] += 0.5
        clock[0] += 1.5
        timer.count(10)
    with timer.paused():
        clock[0] += 1000
    assert timer.read() == (40 / 8, 2 / 8)
    clock[0] += 1
    timer.count(7)
    assert timer.read() == (7, 0)


def test_durations():
    assert [duration(s) for s in (0, 59.6, 61, 3600, 86_399)] == [
        "0:00",
        "1:00",
        "1:01",
        "1:00:00",
        "23:59:59",
    ]
