"""The log of a run."""

import pytest
from tensorboardX.event_file_writer import EventsWriter

from convit_jax.rundir import read_metrics
from convit_jax.training.metrics import MetricsLog


def test_lines_of_steps_that_are_repeated_are_dropped_and_tensorboard_has_each_head(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(EventsWriter, "write_event", lambda writer, event: events.append(event))
    gates = [[0.7311, 0.1], [0.0, 1.0]]
    log = MetricsLog(tmp_path, 0, {})
    log.write(4, 0.4, {"val_top1": 50.0, "gates": gates})
    log.write(6, 0.6, {"train_loss": 6.0})
    log.close()
    values = {value.tag: value.simple_value for event in events for value in event.summary.value}
    first_layer = {"layer_1/mean": 0.41555, "layer_1/head_1": 0.7311, "layer_1/head_2": 0.1}
    layers = first_layer | {"layer_2/mean": 0.5, "layer_2/head_1": 0.0, "layer_2/head_2": 1.0}
    of_gates = {f"gates/{name}": value for name, value in layers.items()}
    assert values == pytest.approx({"val_top1": 50.0, "train_loss": 6.0, **of_gates})

    top1 = {}
    log = MetricsLog(tmp_path, 4, top1)
    line = {"step": 4, "epoch": 0.4, "val_top1": 50.0, "gates": gates}
    assert read_metrics(tmp_path / "metrics.jsonl") == [line] == [log.last]
    assert top1 == log.top1 == {4: 50.0}
    log.close()
    MetricsLog(tmp_path, 0, {}).close()  # a run that starts over
    assert read_metrics(tmp_path / "metrics.jsonl") == []
