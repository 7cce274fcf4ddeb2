"""The training step: accumulation, metrics, randomness."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_same

from convit_jax.models.variants import abstract_model, initial_params
from convit_jax.training.optimizer import make_optimizer
from convit_jax.training.plan import make_plan
from convit_jax.training.step import FINE, make_train_step, new_state, train_metrics

BUILT = {}  # compiled steps of this module, by micro-batches
SEED = np.uint32(0)


def schedule(step):
    return jnp.float32(1e-3) * (step + 1)


@pytest.fixture
def stepper(digits_config):
    """Build (step, state, batch) of a config with randomness and an average of the weights."""

    def build(accumulate=1):
        if accumulate not in BUILT:
            digits_config.accumulate = accumulate
            digits_config.augment.update(mixup=0.8, cutmix=1.0)
            digits_config.optim.ema_decay = 0.5
            plan = make_plan(digits_config, devices=1)
            graphdef, params = abstract_model(plan.model)
            optimizer = make_optimizer(digits_config.optim, schedule, params)
            state = new_state(initial_params(plan.model, 0), optimizer, ema=True)
            step = make_train_step(graphdef, optimizer, schedule, digits_config, 10)
            BUILT[accumulate] = jax.jit(step), state, plan.train(range(16))
        return BUILT[accumulate]

    return build


def test_accumulated_micro_batches_give_the_step_of_the_whole_batch(stepper):
    step, state, batch = stepper()
    whole, metrics = step(state, train_metrics(), batch, SEED)
    step, state, batch = stepper(accumulate=4)
    parts, metrics_of_parts = step(state, train_metrics(), batch, SEED)
    assert_same(whole["opt_state"], parts["opt_state"], atol=1e-6, rtol=1e-4)
    assert metrics["correct"] == metrics_of_parts["correct"]
    np.testing.assert_allclose(metrics["loss"], metrics_of_parts["loss"], rtol=1e-6)


def test_metrics_are_sums_over_steps_and_the_average_follows_its_decay(stepper):
    step, state, batch = stepper()
    once, metrics = step(state, train_metrics(), batch, SEED)
    twice, total = step(once, metrics, batch, SEED)
    _, second = step(once, train_metrics(), batch, SEED)
    assert (total["images"], twice["step"], total["bad_step"]) == (32, 2, FINE)
    np.testing.assert_allclose(total["loss"], metrics["loss"] + second["loss"], rtol=1e-6)
    np.testing.assert_allclose(total["lr"], 2e-3, rtol=1e-6)
    start, first, second = (np.asarray(s["params"]["head"]["kernel"]) for s in (state, once, twice))
    expected = 0.25 * start + 0.25 * first + 0.5 * second
    np.testing.assert_allclose(twice["ema"]["head"]["kernel"], expected, rtol=1e-5, atol=1e-7)


def test_randomness_depends_on_the_step_and_the_seed_only(stepper):
    step, state, batch = stepper()
    losses = [
        float(step({**state, "step": jnp.int32(number)}, train_metrics(), batch, np.uint32(seed))[1]["loss"])
        for number, seed in ((3, 5), (3, 5), (4, 5), (3, 2**32 - 1))
    ]
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3
