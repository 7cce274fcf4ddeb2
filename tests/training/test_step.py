"""The training step: metrics, randomness. Accumulation: test_distill.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from conftest import TINY

from configs import digits
from convit_jax.models.variants import abstract_model, initial_params
from convit_jax.training.optimizer import make_optimizer
from convit_jax.training.plan import make_plan
from convit_jax.training.step import FINE, make_train_step, new_state, train_metrics

SEED = np.uint32(0)


@functools.cache
def built():
    """(step, state, batch) of a config with randomness and an average of the weights."""
    config = digits.get_config()
    config.update_from_flattened_dict(TINY | {"augment.mixup": 0.8, "augment.cutmix": 1.0, "optim.ema_decay": 0.5})
    plan, schedule = make_plan(config, devices=1), lambda step: jnp.float32(1e-3) * (step + 1)
    graphdef, params = abstract_model(plan.model)
    optimizer = make_optimizer(config.optim, schedule, params)
    state = new_state(initial_params(plan.model, 0), optimizer, ema=True)
    return jax.jit(make_train_step(graphdef, optimizer, schedule, config, 10)), state, plan.train(range(16))


def test_metrics_are_sums_over_steps_and_the_average_follows_its_decay():
    step, state, batch = built()
    once, metrics = step(state, train_metrics(), batch, SEED)
    twice, total = step(once, metrics, batch, SEED)
    _, second = step(once, train_metrics(), batch, SEED)
    assert (total["images"], twice["step"], total["bad_step"]) == (32, 2, FINE)
    np.testing.assert_allclose(total["loss"], metrics["loss"] + second["loss"], rtol=1e-6)
    np.testing.assert_allclose(total["lr"], 2e-3, rtol=1e-6)
    start, first, second = (np.asarray(s["params"]["head"]["kernel"]) for s in (state, once, twice))
    expected = 0.25 * start + 0.25 * first + 0.5 * second
    np.testing.assert_allclose(twice["ema"]["head"]["kernel"], expected, rtol=1e-5, atol=1e-7)


def test_randomness_depends_on_the_step_and_the_seed_only():
    step, state, batch = built()
    losses = [
        float(step({**state, "step": jnp.int32(number)}, train_metrics(), batch, np.uint32(seed))[1]["loss"])
        for number, seed in ((3, 5), (3, 5), (4, 5), (3, 2**32 - 1))
    ]
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3
