"""One device and eight simulated ones, with and without fsdp: the same training."""

import re

import numpy as np
import pytest
from conftest import SPEEDS, assert_same, saved

from convit_jax.errors import UserError
from convit_jax.rundir import read_metrics
from convit_jax.training.loop import train
from convit_jax.training.plan import make_plan
from convit_jax.training.setup import Steps
from convit_jax.training.sharding import make_mesh, put_batch


def test_a_run_on_one_device_continues_on_eight_as_if_it_had_stayed(digits_config, tmp_path):
    recipe = digits_config  # every kind of randomness, for a few steps
    recipe.steps, recipe.model.drop_path_rate, recipe.model.drop_rate = 6, 0.2, 0.1
    recipe.augment.update(mixup=0.8, cutmix=1.0, hflip=True)
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    train(recipe, whole)
    recipe.steps = 3
    train(recipe, moved)
    recipe.steps, recipe.mesh.data, recipe.mesh.fsdp = 6, -1, 4
    recipe.model.scan_unroll = 2  # which fixes a layout
    recipe.data.resize, recipe.data.canvas = "device", 16
    train(recipe, moved)
    assert_same(saved(whole), saved(moved), atol=2e-5, rtol=1e-4)
    for line, other in zip(*(read_metrics(run / "metrics.jsonl")[-2:] for run in (whole, moved)), strict=True):
        for name in set(line) - {*SPEEDS}:
            rounded = 1e-4 if isinstance(line[name], list) else 0  # of attention, to four decimals
            np.testing.assert_allclose(line[name], other[name], rtol=1e-4, atol=rounded)


def compiled_step(config, data, fsdp):
    """The training step of a run on a mesh."""
    mesh = make_mesh(data, fsdp)
    plan = make_plan(config, devices=mesh.size, on_device=True)
    steps, batch = Steps(config, plan, mesh), put_batch(plan.train(range(config.batch_size)), mesh)
    lowered = steps.train.func.lower(steps.shapes["state"], steps.shapes["metrics"], batch, **steps.train.keywords)
    return lowered.compile()


def test_the_collectives_are_those_that_the_mesh_calls_for_and_memory_falls_with_fsdp(digits_config):
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
    found, state_bytes, digits_config.data.canvas = {}, {}, 8
    for data, fsdp, mixup in ((8, 1, 0.0), (4, 2, 0.8)):
        digits_config.augment.mixup = mixup
        step = compiled_step(digits_config, data, fsdp)
        found[data, fsdp] = set(re.findall(rf" ({kinds})(?:-start)?\(", step.as_text()))
        state_bytes[data, fsdp] = step.memory_analysis().argument_size_in_bytes
    assert found[8, 1] == {"all-reduce"}
    # Parameters are put together; XLA's CPU backend has no reduce-scatter: it sums all and keeps a part.
    # Mixup and cutmix fetch the mirror images of a device's rows from one other device.
    assert found[4, 2] == {"all-gather", "all-reduce", "collective-permute"}
    assert state_bytes[4, 2] < 0.52 * state_bytes[8, 1]


@pytest.mark.parametrize(("data", "fsdp"), [(4, 4), (-1, 3), (0, 1), (-1, 0)])
def test_a_mesh_that_the_devices_do_not_fit_is_refused(data, fsdp):
    with pytest.raises(UserError, match=f"mesh.data is {data} and mesh.fsdp is {fsdp}, which does not fit 8 devices"):
        make_mesh(data, fsdp)
