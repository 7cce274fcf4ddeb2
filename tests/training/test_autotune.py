"""A run takes the fastest form of attention that is right on its device, and keeps it."""

import re
import time

import jax
import pytest

from convit_jax.models.kernels import CudnnBackend, XlaBackend
from convit_jax.rundir import read_json, write_json
from convit_jax.training import autotune
from convit_jax.training.autotune import choose_forms
from convit_jax.training.loop import train
from convit_jax.training.plan import make_plan
from convit_jax.weights.pretrained import load

MS = r" \d+\.\d\d ms \(compiled in \d+\.\d s\)"


def forms(config, kept=None):
    model = choose_forms(config, make_plan(config, devices=1), 1, kept).model
    return model["attention"], model["scan_unroll"]


def slow(content, *qkv):
    jax.debug.callback(lambda: time.sleep(0.02))
    return content(*qkv)


def wrong(content, q, k, v):
    return content(q, k, 0.8 * v)


def broken(content, *qkv):
    raise RuntimeError("CUDNN_STATUS_NOT_SUPPORTED\nat line 7")


@pytest.mark.parametrize(
    ("backend", "change", "line"),
    [
        (XlaBackend, slow, rf"xla{MS}, cudnn{MS}\. The run uses cudnn"),
        (CudnnBackend, slow, rf"xla{MS}, cudnn{MS}\. The run uses xla"),
        (CudnnBackend, wrong, rf"xla{MS}, cudnn is not used \(off by \d+\.\d% from float32\)\. The run uses xla"),
        (CudnnBackend, broken, rf"xla{MS}, cudnn is not used \(RuntimeError\('CUDNN_.*7'\)\)\. The run uses xla"),
    ],
)
def test_the_fastest_right_form_is_used(digits_config, xla_for_cudnn, monkeypatch, capsys, backend, change, line):
    local = 2 if backend is XlaBackend else 0  # plain attention alone compiles faster
    digits_config.model.update(dtype="bfloat16", num_heads=2, local_up_to_layer=local)
    monkeypatch.setattr(backend, "content", lambda *qkv, content=backend.content: change(content, *qkv))
    attention = line.split()[-1]
    assert forms(digits_config) == (attention, 3 if attention == "cudnn" else 1)
    printed = capsys.readouterr().out
    assert re.fullmatch(rf"Attention, 80 images, with gradient: {line}\.\n", printed), printed


def test_without_cudnn_or_bfloat16_nothing_is_tried(digits_config, monkeypatch):
    monkeypatch.setattr(autotune, "_try_forms", None)
    digits_config.model.update(dtype="bfloat16", num_heads=2)
    assert forms(digits_config) == ("xla", 1)
    monkeypatch.setattr(autotune.kernels, "cudnn_available", lambda: True)
    digits_config.model.attention = "cudnn"
    assert forms(digits_config) == ("cudnn", 3)
    digits_config.model.scan_unroll = 2
    assert forms(digits_config) == ("cudnn", 2)
    digits_config.model.update(dtype="float32", attention="auto", scan_unroll="auto")
    assert forms(digits_config) == ("xla", 1)


def test_a_form_that_fails_in_one_process_is_not_used(digits_config, monkeypatch):
    times = {"xla": 3.0, "cudnn": 1.0}
    digits_config.model.update(dtype="bfloat16", num_heads=2)
    monkeypatch.setattr(autotune.kernels, "cudnn_available", lambda: True)
    monkeypatch.setattr(autotune, "_try_forms", lambda *_: [[times[form], form] for form in autotune.FORMS])
    assert forms(digits_config) == ("cudnn", 3)
    other = [[3.0, "xla"], [float("inf"), "cudnn is not used"]]
    monkeypatch.setattr(autotune, "from_all", lambda value: [value, other if isinstance(value, list) else value])
    assert forms(digits_config) == ("xla", 1)


def test_a_run_that_continues_keeps_its_forms(digits_config, trained):
    facts = read_json(trained / "run.json")
    assert (facts.pop("attention"), facts.pop("scan_unroll")) == ("xla", 1)
    kept = {"attention": "cudnn", "scan_unroll": 3}  # as begun on a GPU
    write_json(trained / "run.json", {**facts, **kept})
    train(digits_config, trained)
    facts = read_json(trained / "run.json")
    assert {name: facts[name] for name in kept} == kept
    settings = load(trained).settings  # for commands
    assert (settings["attention"], settings["scan_unroll"]) == ("xla", 1)
    assert forms(digits_config, {}) == ("xla", 1)  # begun by a version without this choice
    digits_config.model.update(attention="xla", scan_unroll=2)
    assert forms(digits_config, kept) == ("xla", 2)


def test_a_dtype_left_open_is_that_of_the_device(digits_config, monkeypatch):
    def dtype(kept=None):
        return choose_forms(digits_config, make_plan(digits_config, devices=1), 1, kept).model["dtype"]

    digits_config.model.update(dtype="auto", attention="xla", scan_unroll=1)
    assert dtype() == "float32"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert dtype() == "bfloat16"
    assert dtype(kept={"dtype": "float32"}) == "float32"
