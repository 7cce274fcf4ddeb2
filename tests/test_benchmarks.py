"""The benchmarks' own arithmetic, and that they run; their numbers are no matter here."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import ROOT
from flax import nnx

from benchmarks.model import Program, known
from benchmarks.model_jax import as_in, network
from benchmarks.model_table import summary
from convit_jax.models.variants import model_settings

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


def test_a_program_is_one_of_ours_in_known_ways_or_of_timm():
    for program in ("convit", "plain: cuDNN", "convit: position dense + unrolled", "timm convit"):
        assert known(program)
    for program in (
        "deit",
        "convit: faster",
        "convit: ",
        "timm convit: cuDNN",
        "convit: cuDNN +unrolled",
        "convit: cuDNN + position dense",
    ):
        assert not known(program)


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


GPU_PROGRAM = """
%fused_update (p.0: bf16[10,4,8], p.1: bf16[4,8], p.2: s32[]) -> bf16[10,4,8] {
  %p.0 = bf16[10,4,8]{2,1,0} parameter(0)
  %p.1 = bf16[4,8]{1,0} parameter(1)
  %p.2 = s32[] parameter(2)
  %bitcast.1 = bf16[1,4,8]{2,1,0} bitcast(%p.1)
  ROOT %update.1 = bf16[10,4,8]{2,1,0} dynamic-update-slice(%p.0, %bitcast.1, %p.2, %p.2, /*index=4*/%p.2)
}
%fused_product (p.0: bf16[10,8,16], p.1: bf16[4,8], p.2: s32[]) -> bf16[4,16] {
  %p.3 = bf16[10,8,16]{2,1,0} parameter(0)
  %p.4 = bf16[4,8]{1,0} parameter(1)
  %p.5 = s32[] parameter(2)
  %slice.1 = bf16[1,8,16]{2,1,0} dynamic-slice(%p.3, %p.5, %p.5, %p.5), dynamic_slice_sizes={1,8,16}
  %bitcast.2 = bf16[8,16]{1,0} bitcast(%slice.1)
  ROOT %dot.1 = bf16[4,16]{1,0} dot(%p.4, %bitcast.2), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
%body (p.6: (s32[], bf16[10,4,8])) -> (s32[], bf16[10,4,8]) {
  %p.6 = (s32[], bf16[10,4,8]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p.6), index=0
  %stack = bf16[10,4,8]{2,1,0} get-tuple-element(%p.6), index=1
  %row = bf16[4,8]{1,0} constant({...})
  %keep = bf16[10,4,8]{2,1,0} fusion(%stack, %row, %i), kind=kLoop, calls=%fused_update
  ROOT %tuple = (s32[], bf16[10,4,8]{2,1,0}) tuple(%i, %keep)
}
ENTRY %main (w: bf16[10,8,16], x: bf16[4,8], i: s32[]) -> bf16[4,16] {
  %w = bf16[10,8,16]{2,1,0} parameter(0)
  %x = bf16[4,8]{1,0} parameter(1)
  %i.1 = s32[] parameter(2)
  %while.1 = (s32[], /*index=1*/bf16[10,4,8]{2,1,0}) while(%start), body=%body, backend_config={"known_trip_count":{"n":"10"}}
  %q = bf16[2,4,3,8]{3,2,1,0} parameter(3)
  %cudnn = (bf16[2,3,4,8]{3,1,2,0}, f32[2,3,4]{2,1,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config":{"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "3", "4", "4"]}}}, metadata={op_name="jit(step)/content/dot_product_attention_fwd"}
  %gemm = (bf16[4,4]{1,0}, s8[32]{0}) custom-call(%x, %x), custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"]}}}
  %sum = (f32[8]{0}, f32[8]{0}) all-reduce-start(%x), to_apply=%add
  ROOT %product = bf16[4,16]{1,0} fusion(%w, %x, %i.1), kind=kCustom, calls=%fused_product
}
"""  # noqa: E501


def test_each_way_of_convit_is_compared_with_the_plain_network_in_the_same_way():
    class Options:
        tasks, rounds = ["training"], 1

    def program(name, rate, megabytes):
        answer = dict(images_per_second=rate, images_per_processor_second=rate, first_step=1.0, macs=1e9)
        answer |= dict(first_step_processor=1.0, peak_mb=1.0, program_mb=megabytes)
        return Program(name, [], {}, answers={"inference": [], "training": [answer], "peak": []})

    running = [program("convit", 10.0, 3.0), program("plain", 20.0, 2.0)]
    running += [
        program("convit: position dense", 15.0, 3.0),
        program("convit: cuDNN", 30.0, 5.0),
        program("plain: cuDNN", 40.0, 4.0),
        program("timm convit", 5.0, 1.0),
    ]
    ratios = {row["ratio"]: row for row in summary(running, Options)["ratios"]}
    assert {name: row.get("images_per_second") for name, row in ratios.items()} == {
        "convit / plain": 0.5,
        "convit / timm convit": 2.0,
        "convit: position dense / plain": 0.75,
        "convit: position dense / timm convit": 3.0,
        "convit: position dense / convit": 1.5,
        "convit: cuDNN / plain: cuDNN": 0.75,
        "convit: cuDNN / timm convit": 6.0,
        "convit: cuDNN / convit": 3.0,
        "plain: cuDNN / plain": 2.0,
        "memory convit / plain": None,
        "memory convit: position dense / plain": None,
        "memory convit: cuDNN / plain: cuDNN": None,
    }
    assert ratios["memory convit: cuDNN / plain: cuDNN"]["value"] == 1.25
