"""What is printed and kept of a run before its first step."""

from pathlib import Path

import numpy as np
import pytest

from convit_jax.models.variants import abstract_model
from convit_jax.training.plan import make_plan
from convit_jax.training.sharding import make_mesh
from convit_jax.training.summary import describe_run, facts, peak_flops


def rate_line(config):
    """(the line about the learning rate, the largest one as run.json has it)."""
    plan = make_plan(config, devices=1)
    params = abstract_model(plan.model)[1]
    run = facts(config, plan, params, make_mesh(1, 1), None)
    lines = describe_run(config, run, Path("run")).splitlines()
    (line,) = [line for line in lines if line.startswith("Rate")]
    return line.split(maxsplit=1)[1], run["peak_learning_rate"]


def test_the_peak_of_the_rate_is_that_of_the_runs_own_steps(digits_config):
    digits_config.steps, digits_config.epochs = None, 100
    digits_config.optim.warmup_epochs = 5.0
    line, rate = rate_line(digits_config)
    assert line == "0.001242 at most (0.008 x batch / 512 = 0.00125 after 5 epochs of warm-up)"
    cosine = 1e-5 + 0.5 * (0.00125 - 1e-5) * (1 + np.cos(np.pi * 5 / 100))
    assert rate == pytest.approx(cosine, rel=1e-3)

    digits_config.optim.schedule_per = "epoch"
    digits_config.epochs = 2  # both at warmup_lr: the original's schedule is an epoch late
    line, rate = rate_line(digits_config)
    assert line.startswith("1e-06 at most (")
    assert rate == pytest.approx(1e-6)


@pytest.mark.parametrize(
    ("device_kind", "dtype", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA L40", "bfloat16", None),
        ("NVIDIA H200", "float32", None),
    ],
)
def test_the_peak_of_a_device_is_known_by_its_name(device_kind, dtype, flops):
    assert peak_flops(device_kind, dtype) == flops
