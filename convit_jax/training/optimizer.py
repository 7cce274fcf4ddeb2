"""AdamW as DeiT and ConViT use it: the schedule of the learning rate, what decays, what is frozen, EMA.

The schedule is timm's CosineLRScheduler: linear warm-up from warmup_lr, then half a cosine to
min_lr over all epochs; only the peak is scaled with the batch. The original steps it once an epoch,
after the epoch, so that epochs 0 and 1 both run at warmup_lr (`schedule_per="epoch"`); "step" is
the same curve without steps and without that delay.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax

from convit_jax.errors import UserError

NO_DECAY = ("bias", "scale", "gating_param")  # the 1-D parameters of a block, before stacking


def peak_learning_rate(optim, batch_size):
    """lr of the recipe, given for 512 images, at this global batch size."""
    return optim.lr * batch_size / 512


def cosine_schedule(t, xp, *, epochs, peak, min_lr, warmup_lr, warmup_epochs):
    """Learning rate at time t in epochs (array of module xp, numpy or jax.numpy)."""
    warmup = warmup_lr + t * (peak - warmup_lr) / max(warmup_epochs, 1e-9)
    cosine = min_lr + 0.5 * (peak - min_lr) * (1 + xp.cos(math.pi * t / epochs))
    return xp.where(t < warmup_epochs, warmup, xp.where(t < epochs, cosine, min_lr))


def run_schedule(config, plan):
    """The schedule of a run, of its config and its training.plan.Plan."""
    return make_schedule(
        config.optim,
        epochs=plan.epochs,
        batch_size=config.batch_size,
        epoch_length=plan.train.slots.epoch_length,
    )


def make_schedule(optim, *, epochs, batch_size, epoch_length):
    """Step (int array) -> learning rate (float32).

    Args:
      optim: the config's section. epochs: of the whole run, may be fractional.
      batch_size: global. epoch_length: images an epoch.
    """
    curve = dict(
        epochs=epochs,
        peak=peak_learning_rate(optim, batch_size),
        min_lr=optim.min_lr,
        warmup_lr=optim.warmup_lr,
        warmup_epochs=optim.warmup_epochs,
    )
    if optim.schedule_per == "step":
        return lambda step: cosine_schedule(step * (batch_size / epoch_length), jnp, **curve).astype(
            jnp.float32
        )
    numbers = np.arange(math.ceil(epochs))
    rates = cosine_schedule(np.maximum(numbers - 1, 0), np, **curve).astype(np.float32)
    first_steps = (-(-numbers * epoch_length // batch_size)).astype(np.int32)

    def schedule(step):
        epoch = jnp.searchsorted(jnp.asarray(first_steps), step, side="right") - 1
        return jnp.asarray(rates)[epoch]

    return schedule


def dotted(path):
    """'gpsa_blocks.attn.qk.kernel' from a key path of a nested dict."""
    return ".".join(key.key for key in path)


def frozen_mask(params, patterns):
    """Tree of bool: which parameters have one of the patterns in their dotted name.

    An empty pattern, as --config.optim.frozen= gives it, names none.

    Raises:
      UserError: a pattern that names no parameter, or patterns that leave none to train.
    """
    patterns = [pattern for pattern in patterns if pattern]
    names = [dotted(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for pattern in patterns:
        if not any(pattern in name for name in names):
            raise UserError(f"optim.frozen has {pattern!r}, which names no parameter of {', '.join(names)}.")
    if all(any(pattern in name for pattern in patterns) for name in names):
        raise UserError(f"optim.frozen is {patterns}, which leaves no parameter to train: freeze fewer.")
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(pattern in dotted(path) for pattern in patterns), params
    )


def make_optimizer(optim, schedule, params):
    """The optax transformation of a config's `optim` section, for parameters of this structure.

    Decay spares biases, norms and gates but not pos_proj.kernel, pos_embed and cls_token, as the
    original's distributed runs do. Frozen parameters get neither gradient nor decay.
    """
    frozen = frozen_mask(params, optim.frozen)
    decayed = jax.tree_util.tree_map_with_path(
        lambda path, frozen: path[-1].key not in NO_DECAY and not frozen, frozen
    )
    parts = [optax.masked(optax.set_to_zero(), frozen)] if optim.frozen else []
    if optim.clip_norm > 0:
        parts.append(optax.clip_by_global_norm(optim.clip_norm))
    return optax.chain(
        *parts,
        optax.scale_by_adam(b1=optim.b1, b2=optim.b2, eps=optim.eps),
        optax.add_decayed_weights(optim.weight_decay, mask=decayed),
        optax.scale_by_learning_rate(schedule),
    )


def ema_update(ema, params, decay):
    """decay * ema + (1 - decay) * params, leaf by leaf."""
    return jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new, ema, params)
