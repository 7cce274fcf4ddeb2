"""The benchmarks run and their arithmetic is right; their speeds do not matter here."""

import argparse
import io
import json
import sys
import time

import jax
import numpy as np
import pytest
from conftest import run_python
from PIL import Image

from benchmarks import loader, loop, model
from benchmarks.model_jax import architecture
from convit_jax.models.variants import abstract_model, model_settings

SETTINGS = dict(depth=2, local_up_to_layer=1, embed_dim=16, num_heads=4, patch_size=8, num_classes=10)


def test_the_benchmark_of_models_runs_and_writes_its_table(tmp_path):
    options = ["--models=convit_tiny@16", "--batch=2", "--rounds=1", "--tasks=training", "--seconds=0.01"]
    options += ["--programs=plain+unrolled,timm-convit", f"--settings={json.dumps(SETTINGS)}"]
    done = run_python("-m", "benchmarks.model", *options, f"--json={tmp_path / 'x'}")
    assert done.returncode == 0, done.stderr
    assert "convit_tiny@16, batch 2, 1 rounds, cpu" in done.stdout
    found = json.loads((tmp_path / "x").read_text())["models"]["convit_tiny@16"]
    (row,) = found["rates"]  # no peer, so timm is left out
    assert row["program"] == "plain+unrolled"
    assert min(row["images_per_second"], *row["first_step"], row["mfu"], row["program_mb"]) > 0


def test_the_plain_network_differs_only_in_the_position():
    settings = model_settings("convit_tiny", image_size=16, **SETTINGS)
    sizes = {}
    for program in ("convit", "plain"):
        with architecture(program):
            _, params = abstract_model(settings)
        sizes[program] = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in params.items()}
    position = 3 * 4 + 4 + 4  # pos_proj and gates of four heads
    sizes["plain"]["gpsa_blocks"] += position
    assert sizes["plain"] == sizes["convit"]


def test_failed_and_late_programs_do_not_stop_the_others():
    answer = json.dumps({"images_per_second": 5.0})
    scripts = {
        "convit": f"print('a warning'); print('{answer}')",
        "plain": "raise SystemExit(1)",
        "timm-convit": f"import time; print('{answer}', flush=True); time.sleep(60)",
    }
    processes = {name: ([sys.executable, "-S", "-c", script], {}) for name, script in scripts.items()}
    late = processes.pop("timm-convit")
    options = argparse.Namespace(rounds=2, tasks=["inference"], seconds=1)
    kept = [str(answers) for answers in model.measure(processes, options, time.monotonic() + 60)]
    found = {"inference": {"images_per_second": 5.0}}
    assert len(kept) == 3  # plain is not run again
    assert kept[-1] == str({"convit": [found, found], "plain": [{}]})
    assert not list(model.measure(processes, options, time.monotonic()))  # no time for any of them
    assert model.run_once(late, ["inference", "training"], 1, 1) == found


def test_ratios_are_medians_over_rounds_with_the_same_form():
    def turns(*rates):
        return [{"training": dict(images_per_second=rate, first_step=1.0, macs=1e9)} for rate in rates]

    answers = {
        "convit": [{**turn, "peak": {"flops": 1e12}} for turn in turns(10.0, 30.0, 20.0)],
        "plain": turns(10.0, 10.0, 10.0),
        "other-convit": turns(5.0, 5.0, 5.0),
        "convit+cudnn": turns(40.0, 40.0),
        "plain+cudnn": turns(20.0),
        "timm-convit": turns(4.0, 5.0, 5.0),
    }
    found = model.summary(answers)
    assert {row["ratio"]: row["median"] for row in found["ratios"]} == {
        "convit / plain": 2.0,
        "convit / other-convit": 4.0,
        "convit / timm-convit": 4.0,
        "other-convit / timm-convit": 1.0,
        "convit+cudnn / convit": (4 + 4 / 3) / 2,
        "convit+cudnn / plain+cudnn": 2.0,
        "convit+cudnn / timm-convit": 9.0,
    }
    assert found["ratios"][0]["range"] == [1.0, 3.0]
    assert found["rates"][0]["mfu"] == pytest.approx(6e9 * 20 / 1e12)


def test_the_loop_and_its_step_give_a_rate_for_each_window(digits_config):
    digits_config.steps, digits_config.batch_size = 8, 8
    digits_config.model.depth, digits_config.model.local_up_to_layer = 2, 1
    loop.prepare(digits_config)
    for rates in (loop.loop_rates(digits_config), loop.step_rates(digits_config)):
        assert len(rates) == 2
        assert min(rates) > 0


def test_the_loader_gives_a_rate(monkeypatch):
    monkeypatch.setattr(loader, "SIZE", 16)
    file = io.BytesIO()
    Image.fromarray(np.zeros((20, 24, 3), np.uint8)).save(file, "JPEG")
    for program in ("pillow", "repeats", "device", "evaluate_device"):
        assert loader.rate(program, [file.getvalue()] * 3, 0.01) > 0
