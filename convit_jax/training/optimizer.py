"""AdamW as DeiT and ConViT use it: learning rate schedule, weight decay, layer decay and frozen parameters.

The schedule is timm's CosineLRScheduler: linear warm-up from warmup_lr, then half a cosine to min_lr over all
epochs. Only the peak is scaled with the batch size. The original updates the rate once an epoch, after the
epoch, so that epochs 0 and 1 both run at warmup_lr (schedule_per="epoch"). schedule_per="step" is the same
curve without steps and without that delay.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from convit_jax.errors import UserError
from convit_jax.training.plan import Plan
from convit_jax.weights.names import first_blocks

NO_DECAY = ("bias", "scale", "gating_param")  # parameters that are 1-D in the original
EMBEDDINGS = ("patch_embed", "pos_embed", "cls_token", "dist_token")
HEADS = ("head", "head_dist")

Schedule = Callable[[jax.Array], jax.Array]  # step, int [] -> learning rate, float32 []


def run_schedule(config: ConfigDict, plan: Plan) -> Schedule:
    """Returns the learning rate of a run as a function of the step."""
    optim, epochs, batch_size = config.optim, plan.epochs, plan.batch_size
    epoch_length, warmup_epochs = plan.train.slots.epoch_length, plan.warmup_epochs

    def rate(t: Any, xp: Any) -> Any:
        # t: a time in epochs; xp: numpy or jax.numpy
        peak, low = optim.lr * batch_size / 512, optim.min_lr
        warmup = optim.warmup_lr + t * (peak - optim.warmup_lr) / max(warmup_epochs, 1e-9)
        cosine = low + 0.5 * (peak - low) * (1 + xp.cos(math.pi * t / epochs))
        return xp.where(t < warmup_epochs, warmup, xp.where(t < epochs, cosine, low))

    def per_step(step: jax.Array) -> jax.Array:
        return rate(step * (batch_size / epoch_length), jnp).astype(jnp.float32)

    numbers = np.arange(math.ceil(epochs))
    rates = rate(np.maximum(numbers - 1, 0), np).astype(np.float32)
    first_steps = (-(-numbers * epoch_length // batch_size)).astype(np.int32)

    def per_epoch(step: jax.Array) -> jax.Array:
        epoch = jnp.searchsorted(jnp.asarray(first_steps), step, side="right") - 1
        return jnp.asarray(rates)[epoch]

    return per_step if optim.schedule_per == "step" else per_epoch


def frozen_mask(params: Any, patterns: Sequence[str]) -> Any:
    """Returns a tree of bool: which parameters have one of the patterns in their dotted name."""
    # --config.optim.frozen=head,pos_embed gives one text, and --config.optim.frozen= an empty one.
    patterns = [part for pattern in patterns for part in pattern.split(",") if part]
    names = jax.tree.map_with_path(lambda path, _: jax.tree_util.keystr(path, simple=True, separator="."), params)
    for pattern in patterns:
        if not any(pattern in name for name in jax.tree.leaves(names)):
            known = ", ".join(jax.tree.leaves(names))
            raise UserError(f"optim.frozen has {pattern!r}, which matches no parameter. They are: {known}.")
    return jax.tree.map(lambda name: any(pattern in name for pattern in patterns), names)


def layer_scales(params: Any, optim: ConfigDict) -> Any:
    """Returns the factor of each parameter's learning rate: layer_decay ** (layers above it), 0 if it is frozen.

    Layers as in BEiT: the embeddings, each block, then the last norm and the head as one. A stack of L blocks has a
    factor for each block, float32 [L, 1, ...].
    """
    first = first_blocks(params)
    depth = first["sa_blocks"] + jax.tree.leaves(params["sa_blocks"])[0].shape[0]
    last_frozen = {"none": -1, "backbone": depth + 1}.get(optim.freeze, optim.freeze)

    def scale(path: Any, leaf: Any, is_frozen: bool) -> np.ndarray:
        name = path[0].key
        if name in first:
            numbers = 1 + first[name] + np.arange(leaf.shape[0])
            layer = numbers.reshape(-1, *[1] * (len(leaf.shape) - 1))
        else:
            layer = np.array(0 if name in EMBEDDINGS else depth + 1)
        stays = is_frozen | ((layer <= last_frozen) & (name not in HEADS))
        return np.where(stays, 0.0, optim.layer_decay ** (depth + 1 - layer)).astype(np.float32)

    return jax.tree.map_with_path(scale, params, frozen_mask(params, optim.frozen))


def count_trained(params: Any, optim: ConfigDict) -> int:
    """Returns the number of parameters that are not frozen, at least 1; params may be shapes."""
    parts = zip(jax.tree.leaves(params), jax.tree.leaves(layer_scales(params, optim)), strict=True)
    count = sum(int(np.count_nonzero(scale)) * (math.prod(leaf.shape) // scale.size) for leaf, scale in parts)
    if not count:
        raise UserError("optim.freeze and optim.frozen leave no parameter to train: freeze fewer.")
    return count


def make_optimizer(optim: ConfigDict, schedule: Schedule, params: Any) -> optax.GradientTransformation:
    """Returns the optimizer of a run, for parameters of this structure.

    Weight decay includes pos_proj.kernel, pos_embed and cls_token, as the original's distributed runs do.
    """
    frozen = frozen_mask(params, optim.frozen)
    decayed = jax.tree.map_with_path(lambda path, frozen: path[-1].key not in NO_DECAY and not frozen, frozen)
    by_layer = optim.freeze != "none" or optim.layer_decay < 1
    scales = layer_scales(params, optim) if by_layer else None

    def drop_frozen(gradients: Any, _: Any) -> Any:
        return jax.tree.map(lambda gradient, scale: jnp.where(scale > 0, gradient, 0.0), gradients, scales)

    def scale_layers(updates: Any, _: Any) -> Any:
        return drop_frozen(jax.tree.map(jnp.multiply, updates, scales), None)

    return optax.chain(
        *([optax.masked(optax.set_to_zero(), frozen)] if optim.frozen else []),
        *([optax.stateless(drop_frozen)] if by_layer else []),
        *([optax.clip_by_global_norm(optim.clip_norm)] if optim.clip_norm > 0 else []),
        optax.scale_by_adam(b1=optim.b1, b2=optim.b2, eps=optim.eps),
        optax.add_decayed_weights(optim.weight_decay, mask=decayed),
        *([optax.stateless(scale_layers)] if by_layer else []),
        optax.scale_by_learning_rate(schedule),
    )
