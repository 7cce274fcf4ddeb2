"""The training step: accumulation, losses, and the first step that is not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convit_jax.models.variants import abstract_model, initial_params
from convit_jax.training.optimizer import make_optimizer
from convit_jax.training.plan import make_plan
from convit_jax.training.step import (
    FINE,
    eval_metrics,
    make_eval_step,
    make_train_step,
    new_state,
    soft_cross_entropy,
    train_metrics,
)


def schedule(step):
    return jnp.float32(1e-3) * (step + 1)


@pytest.fixture
def stepper(digits_config):
    """Build (step, state, batch) of a config."""

    def build(config=digits_config, rows=16):
        plan = make_plan(config, devices=1)
        graphdef, params = abstract_model(plan.model)
        optimizer = make_optimizer(config.optim, schedule, params)
        state = new_state(initial_params(plan.model, 0), optimizer, ema=config.optim.ema_decay > 0)
        batch = plan.train(range(rows))
        return jax.jit(make_train_step(graphdef, optimizer, schedule, config, 10)), state, batch

    return build


def test_accumulated_micro_batches_give_the_step_of_the_whole_batch(stepper, digits_config):
    digits_config.augment.mixup = 0.8
    digits_config.augment.cutmix = 1.0
    step, state, batch = stepper()
    whole, metrics = step(state, train_metrics(), batch, 0)
    digits_config.accumulate = 4
    step, state, batch = stepper()
    parts, metrics_of_parts = step(state, train_metrics(), batch, 0)
    for a, b in zip(jax.tree.leaves(whole["opt_state"]), jax.tree.leaves(parts["opt_state"]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-4)
    assert metrics["correct"] == metrics_of_parts["correct"]
    np.testing.assert_allclose(metrics["loss"], metrics_of_parts["loss"], rtol=1e-6)


def test_metrics_are_sums_over_steps(stepper, digits_config):
    digits_config.optim.ema_decay = 0.5
    step, state, batch = stepper()
    once, metrics = step(state, train_metrics(), batch, 0)
    twice, total = step(once, metrics, batch, 0)
    _, second = step(once, train_metrics(), batch, 0)
    assert (total["images"], twice["step"], total["bad_step"]) == (32, 2, FINE)
    np.testing.assert_allclose(total["loss"], metrics["loss"] + second["loss"], rtol=1e-6)
    np.testing.assert_allclose(total["lr"], 2e-3, rtol=1e-6)
    start, first, second = (np.asarray(s["params"]["head"]["kernel"]) for s in (state, once, twice))
    expected = 0.25 * start + 0.25 * first + 0.5 * second
    np.testing.assert_allclose(twice["ema"]["head"]["kernel"], expected, rtol=1e-5, atol=1e-7)


def test_each_step_and_seed_draw_anew_and_the_same_draw_the_same(stepper, digits_config):
    digits_config.model.drop_path_rate = 0.5
    step, state, batch = stepper()
    losses = [
        float(step({**state, "step": jnp.int32(number)}, train_metrics(), batch, seed)[1]["loss"])
        for number, seed in ((3, 5), (3, 5), (4, 5), (3, np.uint32(2**32 - 1)))
    ]
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3


def test_the_first_step_that_is_not_finite_is_remembered(stepper):
    step, state, batch = stepper()
    broken = {**state, "params": jax.tree.map(lambda p: p * jnp.nan, state["params"])}
    _, metrics = step({**broken, "step": jnp.int32(7)}, train_metrics(), batch, 0)
    assert metrics["bad_step"] == 7
    _, metrics = step({**broken, "step": jnp.int32(8)}, metrics, batch, 0)
    assert metrics["bad_step"] == 7


def test_soft_cross_entropy_of_one_hot_labels_is_the_usual_one():
    logits = np.array([[2.0, 0.0, -1.0], [0.0, 0.5, 0.0]], np.float32)
    expected = np.log(np.exp(logits).sum(1)) - logits[[0, 1], [0, 2]]
    np.testing.assert_allclose(soft_cross_entropy(logits, jax.nn.one_hot([0, 2], 3)), expected, rtol=1e-6)
    uniform = np.full((2, 3), 1 / 3, np.float32)
    np.testing.assert_allclose(soft_cross_entropy(np.zeros((2, 3)), uniform), np.log(3), rtol=1e-6)


def test_evaluation_counts_valid_rows_only(digits_config):
    plan = make_plan(digits_config, devices=1)
    graphdef, _ = abstract_model(plan.model)
    step = jax.jit(make_eval_step(graphdef, digits_config))
    params = initial_params(plan.model, 0)
    batch = plan.test(range(20))
    some = {**batch, "valid": np.arange(20) < 13}
    few = {name: array[:13] for name, array in batch.items()}
    ours, expected = step(params, eval_metrics(), some), step(params, eval_metrics(), few)
    assert ours["images"] == 13
    for name in ("top1", "top5"):
        assert ours[name] == expected[name]
    np.testing.assert_allclose(ours["loss"], expected["loss"], rtol=1e-6)
