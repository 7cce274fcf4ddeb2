"""Learning rates against the original's table, AdamW against its formula, decay, freezing."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ROOT

from configs import default
from convit_jax.errors import UserError
from convit_jax.models.variants import abstract_model, model_settings
from convit_jax.training.optimizer import count_trained, frozen_mask, make_optimizer, run_schedule

IMAGENET = 1_281_167


def make_schedule(*, epochs, batch_size, epoch_length, schedule_per="epoch"):
    """The schedule of the recipe."""
    config = default.get_config()
    config.optim.schedule_per = schedule_per
    slots = SimpleNamespace(epoch_length=epoch_length)
    train = SimpleNamespace(slots=slots)
    plan = SimpleNamespace(epochs=epochs, train=train, batch_size=batch_size, warmup_epochs=config.optim.warmup_epochs)
    return jax.jit(run_schedule(config, plan))


@pytest.mark.parametrize("batch_size", [1024, 512])
def test_rates_of_every_epoch_are_the_originals(batch_size):
    golden = json.loads((ROOT / f"tests/golden/lr_per_epoch_300_bs{batch_size}.json").read_text())
    schedule = make_schedule(epochs=300, batch_size=batch_size, epoch_length=IMAGENET)
    first = np.ceil(np.arange(300) * IMAGENET / batch_size).astype(int)
    last = np.append(first[1:], -(-300 * IMAGENET // batch_size)) - 1
    for steps in (first, last):
        np.testing.assert_allclose(jax.vmap(schedule)(jnp.asarray(steps)), golden, rtol=1e-7)


def test_the_continuous_schedule_passes_through_the_same_curve():
    per_epoch, per_step = (
        make_schedule(epochs=300, batch_size=1000, epoch_length=100_000, schedule_per=per) for per in ("epoch", "step")
    )
    assert per_step(jnp.int32(0)) == np.float32(1e-6)
    for epoch in (1, 3, 4, 6, 100, 299):  # the original is one epoch late
        np.testing.assert_allclose(per_step(jnp.int32(100 * (epoch - 1))), per_epoch(jnp.int32(100 * epoch)), rtol=1e-5)
    rates = jax.vmap(per_step)(jnp.arange(0, 30_000, 10))
    assert np.argmax(rates) == 50  # rises for 5 epochs of 100 steps, then falls
    assert (np.diff(rates)[:50] > 0).all()
    assert (np.diff(rates)[50:] < 0).all()
    np.testing.assert_allclose(per_step(jnp.int32(30_000)), 1e-5, rtol=1e-6)


def dotted(path):
    return jax.tree_util.keystr(path, simple=True, separator=".")


def three_blocks():
    """Parameters of a model of two GPSA blocks and a plain one; half of the values are -0.0."""
    settings = model_settings("convit_tiny", image_size=16, embed_dim=4, depth=3, local_up_to_layer=2)
    return jax.tree.map(
        lambda leaf: jnp.asarray(np.resize(np.float32([-0.0, 0.5]), leaf.shape)), abstract_model(settings)[1]
    )


def run_steps(optimizer, params, count):
    """Parameters after `count` steps on gradients of sum(sin(p))."""

    @jax.jit
    def run(params):
        state = optimizer.init(params)
        for _ in range(count):
            grads = jax.tree.map(jnp.cos, params)
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params

    return run(params)


def test_adamw_is_pytorchs_and_decay_spares_biases_norms_and_gates():
    optim, start = default.get_config().optim, three_blocks()
    params = run_steps(make_optimizer(optim, lambda step: 0.01 * (step + 1), start), start, 3)

    def pytorch(p, decay):
        """torch.optim.AdamW, three steps with rates 0.01, 0.02, 0.03, in float64."""
        p, m, v = np.asarray(p, np.float64), 0.0, 0.0
        for t in range(1, 4):
            g = np.cos(p)
            p = p - 0.01 * t * decay * p
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            p = p - 0.01 * t * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        return p

    decayed = ["pos_embed", "cls_token", "patch_embed.proj.kernel", "head.kernel"]
    decayed += [f"gpsa_blocks.attn.{name}.kernel" for name in ("qk", "v", "proj", "pos_proj")]
    decayed += [f"sa_blocks.attn.{name}.kernel" for name in ("qkv", "proj")]
    decayed += [f"{stack}.mlp.{name}.kernel" for stack in ("gpsa_blocks", "sa_blocks") for name in ("fc1", "fc2")]
    for (path, before), after in zip(jax.tree.leaves_with_path(start), jax.tree.leaves(params), strict=True):
        expected = pytorch(before, 0.05 if dotted(path) in decayed else 0.0)
        np.testing.assert_allclose(after, expected, rtol=1e-5, atol=1e-6, err_msg=dotted(path))


def test_frozen_parameters_stay_and_the_others_do_not():
    optim, start = default.get_config().optim, three_blocks()
    optim.frozen = ("gpsa_blocks.attn",)
    params = run_steps(make_optimizer(optim, lambda step: 0.1, start), start, 3)
    for path, moved in jax.tree.leaves_with_path(jax.tree.map(lambda a, b: bool((a != b).any()), params, start)):
        assert moved is not dotted(path).startswith("gpsa_blocks.attn")
    assert not any(jax.tree.leaves(frozen_mask(start, ("",))))
    optim.freeze, optim.frozen = "backbone", ("head",)
    with pytest.raises(UserError, match="leave no parameter to train: freeze fewer"):
        count_trained(start, optim)


def test_clipping_bounds_the_gradient_of_all_parameters_together():
    optim = default.get_config().optim
    optim.clip_norm, optim.eps, optim.weight_decay = 0.5, 1e3, 0.0  # eps so large that Adam is linear
    params = three_blocks()
    optimizer = make_optimizer(optim, lambda step: 1e3, params)
    grads = jax.tree.map(jnp.ones_like, params)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    np.testing.assert_allclose(optax.tree.norm(updates), 0.5, rtol=1e-3)


def by_layer(params):
    """Lists of the arrays of three_blocks(): embeddings, each block, norm, head."""
    flat = {name: [np.asarray(leaf) for leaf in jax.tree.leaves(part)] for name, part in params.items()}
    embeddings = [*flat["patch_embed"], *flat["pos_embed"], *flat["cls_token"]]
    blocks = [
        [leaf[i] for leaf in flat[name]] for name, i in (("gpsa_blocks", 0), ("gpsa_blocks", 1), ("sa_blocks", 0))
    ]
    return [embeddings, *blocks, flat["norm"], flat["head"]]


def test_layer_decay_is_that_of_beit():
    optim = default.get_config().optim
    optim.layer_decay, optim.weight_decay = 0.5, 0.0
    params = three_blocks()
    optimizer = make_optimizer(optim, lambda step: 1.0, params)
    gradients = jax.tree.map(jnp.ones_like, params)
    updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
    for arrays, factor in zip(by_layer(updates), [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 1], strict=True):
        for array in arrays:
            np.testing.assert_allclose(array, -factor, rtol=1e-5)


@pytest.mark.parametrize(("freeze", "frozen_parts"), [("backbone", 5), (1, 2), (3, 4)])
def test_frozen_layers_keep_every_bit_and_the_others_move(freeze, frozen_parts):
    optim = default.get_config().optim
    optim.freeze, optim.clip_norm = freeze, 1.0
    start = three_blocks()
    end = run_steps(make_optimizer(optim, lambda step: 0.1, start), start, 2)
    for part, (before, after) in enumerate(zip(by_layer(start), by_layer(end), strict=True)):
        same = [a.tobytes() == b.tobytes() for a, b in zip(before, after, strict=True)]
        assert same == [part < frozen_parts] * len(same)
