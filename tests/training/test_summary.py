"""What is printed and kept of a run before its first step."""

from pathlib import Path

import numpy as np
import pytest

from convit_jax.models.variants import abstract_model
from convit_jax.training import summary
from convit_jax.training.plan import make_plan
from convit_jax.training.sharding import make_mesh
from convit_jax.training.summary import describe_run, facts, peak_flops


def describe(config):
    """(the lines before the first step, the content of run.json)."""
    plan = make_plan(config, devices=1)
    run = facts(config, plan, abstract_model(plan.model)[1], make_mesh(1, 1), None)
    return describe_run(config, run, Path("run")).splitlines(), run


def test_changed_fields_come_first_and_the_peak_of_the_rate_is_that_of_the_runs_own_steps(digits_config):
    digits_config.steps, digits_config.epochs = None, 100
    digits_config.optim.warmup_epochs = 5.0
    lines, run = describe(digits_config)
    fields = lines[0].removeprefix("Config ").split()  # those that differ from the default
    assert {"model.name=convit_tiny", "data.mean=[0.305,0.305,0.305]", "epochs=100"} <= {*fields}
    assert "augment.num_ops=2" not in fields
    assert "Rate     optim.lr 0.008 x 80 / 512 = 0.00125, after 5 epochs of warm-up" in lines
    cosine = 1e-5 + 0.5 * (0.00125 - 1e-5) * (1 + np.cos(np.pi * 5 / 100))
    assert run["peak_learning_rate"] == pytest.approx(cosine, rel=1e-3)

    digits_config.optim.schedule_per = "epoch"
    digits_config.epochs = 2  # both at warmup_lr: the original's schedule is an epoch late
    lines, run = describe(digits_config)
    assert run["peak_learning_rate"] == pytest.approx(1e-6)
    assert any(line.endswith("of warm-up, of which these steps reach 1e-06") for line in lines)


@pytest.mark.parametrize(
    ("fields", "trained"),
    [
        ({"freeze": "backbone"}, 10 * 16 + 10),  # the head
        ({"freeze": "backbone", "frozen": ("head.bias",)}, 10 * 16),
        ({"freeze": 2}, 10 * 16 + 10 + 2 * 16 + 12 * 16**2 + 13 * 16 - 48),  # and the last norm and block
    ],
)
def test_the_number_of_trained_parameters_is_said(digits_config, fields, trained):
    assert "trained" not in describe(digits_config)[0][1]
    digits_config.optim.update(fields)
    assert f" parameters ({trained:,} trained), 8 x 8 px" in describe(digits_config)[0][1]


def test_attention_without_cudnn_is_said(digits_config, monkeypatch):
    digits_config.model.update(attention="cudnn", dtype="bfloat16", embed_dim=32)
    caution = "Caution  XLA computes attention: cudnn needs an NVIDIA GPU, Ampere or later"
    assert caution in describe(digits_config)[0]
    monkeypatch.setattr(summary, "cudnn_available", lambda: True)
    assert caution not in describe(digits_config)[0]


@pytest.mark.parametrize(
    ("fields", "caution"),
    [
        ({"model.name": "convit_tiny_patch16_384"}, "the model's name says 384 px: set model.image_size=384"),
        ({"batch_size": 1440}, "batch_size 1,440 is larger than the 1,437 training images: lower it"),
        ({"optim.warmup_epochs": 0.05}, "the warm-up is shorter than one step: raise optim.warmup_epochs, or lower"),
        ({"optim.warmup_epochs": 1.0}, "the warm-up takes 18 steps, but the run only 12: lower optim.warmup_epochs"),
    ],
)
def test_a_size_batch_or_warm_up_that_does_not_fit_is_said(digits_config, fields, caution):
    assert not any("Caution" in line for line in describe(digits_config)[0])
    digits_config.update_from_flattened_dict(fields)
    (found,) = [line for line in describe(digits_config)[0] if "Caution" in line]
    assert found.startswith(f"Caution  {caution}")


def test_the_peak_of_a_device_is_known_by_its_name():
    assert peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "bfloat16") == 756e12
    assert peak_flops("NVIDIA L40", "bfloat16") is peak_flops("NVIDIA H200", "float32") is None
