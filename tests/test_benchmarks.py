"""The benchmarks' own arithmetic, and that they run; their numbers are no matter here."""

import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT
from flax import nnx

from benchmarks.attention import fused
from benchmarks.model import Program, known, summary
from benchmarks.model_jax import as_in, network
from benchmarks.reproducibility import differences
from benchmarks.where import kinds
from convit_jax.models.variants import abstract_model, model_settings

SETTINGS = dict(depth=2, local_up_to_layer=1, embed_dim=16, num_heads=4, patch_size=8, num_classes=10)


def test_the_benchmark_of_models_runs_and_writes_its_table(tmp_path):
    command = [sys.executable, "-m", "benchmarks.model", "--models=convit_tiny@16", "--batch=2", "--fresh"]
    options = [
        "--tasks=training",
        "--programs=convit,convit: position dense + unrolled,plain",
        "--rounds=1",
        "--seconds=0.01",
        f"--settings={json.dumps(SETTINGS)}",
        "--json",
        tmp_path / "x",
    ]
    done = subprocess.run([*command, *options], cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "convit_tiny@16, batch 2, 1 rounds, cpu" in done.stdout
    assert "training: convit: position dense + unrolled:" in done.stdout
    found = json.loads((tmp_path / "x").read_text())["models"]["convit_tiny@16"]
    rows = {row["program"]: row for row in found["rates"]}
    assert list(rows) == ["convit", "convit: position dense + unrolled", "plain"]
    for row in rows.values():
        assert min(row["images_per_second"], row["first_step_cold"], row["mfu"], row["program_mb"]) > 0
        assert row["peak_mb"] > 0
    assert len(found["ratios"]) == 3  # plain and the other way; memory


def test_the_plain_network_differs_in_the_position_alone():
    settings = model_settings("convit_tiny", image_size=16, **SETTINGS)
    params = {}
    for program in ("convit", "plain"):
        with as_in(program, settings) as of_it:
            params[program] = network(of_it)[1]
    convit, plain = params.values()
    weights = {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in convit.items()}
    position = 3 * 4 + 4 + 4  # pos_proj and gates of four heads
    assert {name: sum(leaf.size for leaf in jax.tree.leaves(tree)) for name, tree in plain.items()} == {
        **weights,
        "gpsa_blocks": weights["gpsa_blocks"] - position,
    }


@pytest.mark.parametrize("way", ["position over heads only", "position dense + unrolled", "remat"])
def test_another_way_computes_the_same(way):
    settings = model_settings("convit_tiny", image_size=16, **SETTINGS)
    images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    outputs = []
    for program in ("convit", f"convit: {way}"):
        with as_in(program, settings) as of_it:
            outputs.append(nnx.merge(*network(of_it))(images))
    np.testing.assert_allclose(*outputs, atol=1e-5)


@pytest.mark.parametrize("base", ["convit", "plain"])
def test_the_forward_pass_of_cudnn_is_not_computed_again_for_the_gradient(base, monkeypatch):
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)  # there is none: traced, not run
    wider = {**SETTINGS, "embed_dim": 32, "dtype": "bfloat16"}
    settings = model_settings("convit_tiny", image_size=16, **wider)
    images = jax.ShapeDtypeStruct((2, 16, 16, 3), "float32")
    with as_in(f"{base}: cuDNN", settings) as of_it:
        graphdef, params = abstract_model(of_it)
        loss = jax.grad(lambda params, images: nnx.merge(graphdef, params)(images).sum())
        traced = str(jax.make_jaxpr(loss)(params, images))
    assert traced.count("dot_product_attention_fwd_wrapper[") == 1  # in the loop over the first blocks
    assert traced.count("dot_product_attention_bwd_wrapper[") == 1


def test_a_program_is_one_of_ours_in_known_ways_or_of_timm():
    for program in ("convit", "plain: cuDNN", "convit: cuDNN + position dense + unrolled", "timm convit"):
        assert known(program)
    for program in ("deit", "convit: faster", "convit: ", "timm convit: cuDNN", "convit: cuDNN +unrolled"):
        assert not known(program)


def test_operations_belong_to_what_they_are_or_do():
    text = """
%fused (p: f32[2]) -> f32[2] {
  %copy.1 = f32[2] copy(%p)
  ROOT %add.1 = f32[2] add(%copy.1, %p), metadata={op_name="jit(step)/add"}
}
%body (p: f32[2]) -> f32[2] {
  %dot.1 = f32[2] dot(%p, %p), metadata={op_name="jit(step)/while/dot_general"}
  ROOT %fusion.1 = f32[2] fusion(%p), kind=kLoop, calls=%fused, metadata={op_name="jit(step)/add"}
}
ENTRY %main (p: f32[2]) -> f32[2] {
  %exp.1 = f32[2] exponential(%p), metadata={op_name="jit(step)/transpose(jvp(content))/exp"}
  %copy.2 = f32[2] copy(%p)
  ROOT %while.1 = f32[2] while(%p), body=%body
}
"""
    found = kinds(text)
    assert found["while.1"] is None
    assert found["dot.1"] == "matrix products"
    assert found["fusion.1"].startswith("the rest")
    assert found["exp.1"] == "attention, content"
    assert found["copy.2"] == "copies and transpositions"


def test_a_ratio_is_the_median_over_neighbouring_turns():
    class Options:
        tasks, rounds = ["inference"], 3

    def program(name, rates):
        answers = [
            dict(images_per_second=r, images_per_processor_second=r, first_step=1.0, first_step_processor=1.0)
            | dict(peak_mb=1.0, macs=1e9)
            for r in rates
        ]
        peak = [dict(flops=1e12)]
        return Program(name, [], {}, answers={"inference": answers, "training": [], "peak": peak})

    found = summary([program("convit", [10.0, 30.0, 20.0]), program("plain", [10.0, 10.0, 10.0])], Options)
    assert found["ratios"][0]["images_per_second"] == 2.0
    assert found["ratios"][0]["images_per_second_range"] == [1.0, 3.0]
    assert found["rates"][0]["mfu"] == pytest.approx(2e9 * 20 / 1e12)


def test_runs_are_compared_in_every_number_but_speeds_and_in_their_weights(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "other")
    log = tmp_path / "other/metrics.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lines[1]["train_loss"] += 0.5
    lines[1]["images_per_second"] += 1
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = differences(trained, tmp_path / "other")
    assert found.pop("train_loss") == 0.5
    assert {"val_top1", "gates", "weights"} < set(found)
    assert set(found.values()) == {0.0}
