"""One training step and one evaluation step, as pure functions of plain pytrees.

Metrics are sums that stay on the device from step to step. All randomness is a function of (seed, step)
and the row in the batch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from ml_collections import ConfigDict

from convit_jax.data.augment import augment, normalize
from convit_jax.data.mixup import mix_batch
from convit_jax.data.resize import shown_images
from convit_jax.training.distill import Teacher
from convit_jax.training.optimizer import HEADS, Schedule

FINE = jnp.iinfo(jnp.int32).max  # bad_step of a window in which every loss was finite
TRAIN_STREAM = 0x7261696E  # separates the keys of training from those of the weights, which count from 0

Arrays = dict[str, jax.Array]  # a batch or metrics, by name
State = dict[str, Any]  # a run's step (int32 []), params, opt_state and, with optim.ema_decay, ema of the params


def new_state(params: Any, optimizer: optax.GradientTransformation, *, ema: bool) -> State:
    """Returns the state of step 0 for a nested dict of parameters."""
    state: State = {"step": jnp.int32(0), "params": params, "opt_state": optimizer.init(params)}
    if ema:
        state["ema"] = jax.tree.map(jnp.copy, params)
    return state


def step_keys(seed: int | jax.Array, step: int | jax.Array) -> jax.Array:
    """Returns a step's keys [3]: of augmentation, of mixup and cutmix, of stochastic depth and dropout."""
    seed_key = jax.random.fold_in(jax.random.key(seed), TRAIN_STREAM)
    return jax.random.split(jax.random.fold_in(seed_key, step), 3)


def train_metrics(*, distilled: bool = False) -> Arrays:
    """Returns the metrics of an empty window of steps: sums over images, the last rate, the first bad step."""
    zero, none = jnp.float32(0), jnp.int32(0)
    sums = {"loss": zero, "correct": none, "images": none, "lr": zero, "bad_step": jnp.int32(FINE)}
    return sums | ({"distill_loss": zero} if distilled else {})  # the teacher's part of the loss


def augmented(batch: Arrays, keys: jax.Array, config: ConfigDict, num_classes: int) -> tuple[jax.Array, jax.Array]:
    """Returns images float32 [B, H, W, 3] and soft labels float32 [B, num_classes] to train on."""
    aug, mean, std = config.augment, tuple(config.data.mean), tuple(config.data.std)
    images = augment(batch["image"], keys[0], aug, mean=mean, std=std)
    return mix_batch(images, batch["label"], keys[1], aug, num_classes)


def make_train_step(
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    config: ConfigDict,
    num_classes: int,
    whole: Callable[[Any], Any] = lambda params: params,
    teacher: Teacher | None = None,
) -> Callable[..., tuple[State, Arrays]]:
    """Returns step(state, metrics, batch, seed, teacher_params=None) -> (state, metrics), to be compiled.

    batch: {"image": uint8 [B, H, W, 3], "label": int32 [B]}, or canvases in place of "image" (data/canvas.py). seed:
    uint32 [], an argument so that runs that differ in it alone share a compiled program. whole: gathers sharded
    parameters (sharding.gather).
    """

    def loss_fn(
        params: Any, images: jax.Array, targets: jax.Array, key: jax.Array, teacher_params: Any
    ) -> tuple[jax.Array, Arrays]:
        if config.optim.freeze == "backbone":  # no gradient of it: a linear probe costs a forward pass
            params = {name: part if name in HEADS else jax.lax.stop_gradient(part) for name, part in params.items()}
        model, sums = nnx.merge(graphdef, whole(params)), {}
        if teacher is None:
            logits = model(images, key=key)
            loss = jnp.mean(optax.softmax_cross_entropy(logits, targets))
        else:
            loss, part, logits = teacher.loss(whole(teacher_params), model, images, targets, key)
            sums["distill_loss"] = part * images.shape[0]
        sums["correct"] = jnp.sum(jnp.argmax(logits, -1) == jnp.argmax(targets, -1))
        return loss, sums

    grad_fn = _accumulated(jax.value_and_grad(loss_fn, has_aux=True), config.accumulate)

    def step(
        state: State, metrics: Arrays, batch: Arrays, seed: jax.Array, teacher_params: Any = None
    ) -> tuple[State, Arrays]:
        number, params = state["step"], state["params"]
        image_size = nnx.merge(graphdef, params).image_size
        keys = step_keys(seed, number)
        with jax.named_scope("resizing"):  # scopes name the parts in profiles
            shown = {"image": shown_images(batch, image_size), "label": batch["label"]}
        with jax.named_scope("augmentation"):
            images, targets = augmented(shown, keys, config, num_classes)
        (loss, sums), grads = grad_fn(params, images, targets, keys[2], teacher_params)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state["opt_state"], params)
            params = optax.apply_updates(params, updates)
        finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(grads))
        bad_step, rows = metrics["bad_step"], images.shape[0]
        metrics = {
            **{name: metrics[name] + value for name, value in sums.items()},
            "loss": metrics["loss"] + loss * rows,
            "images": metrics["images"] + rows,
            "lr": schedule(number),
            "bad_step": jnp.where(finite, bad_step, jnp.minimum(bad_step, number)),
        }
        new: State = {"step": number + 1, "params": params, "opt_state": opt_state}
        if "ema" in state:
            decay = config.optim.ema_decay
            new["ema"] = jax.tree.map(lambda ema, p: ema + (1.0 - decay) * (p - ema), state["ema"], params)
        return new, metrics

    return step


def _accumulated(grad_fn: Callable[..., Any], parts: int) -> Callable[..., Any]:
    """grad_fn as a mean over micro-batches; each takes rows from every device's share of the batch."""
    if parts == 1:
        return grad_fn

    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)

    def accumulated(params: Any, images: jax.Array, targets: jax.Array, key: jax.Array, teacher_params: Any) -> Any:
        def add(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, grad_fn(params, *part, teacher_params)), None

        inputs = (split(images), split(targets), jax.random.split(key, parts))
        first = jax.tree.map(lambda x: x[0], inputs)
        shapes = jax.eval_shape(grad_fn, params, *first, teacher_params)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        ((loss, sums), grads), _ = jax.lax.scan(add, zeros, inputs)
        return (loss / parts, sums), jax.tree.map(lambda grad: grad / parts, grads)

    return accumulated


def make_eval_step(
    graphdef: nnx.GraphDef,
    mean: Sequence[float],
    std: Sequence[float],
    whole: Callable[[Any], Any] = lambda x: x,
    *,
    predictions: bool = False,
) -> Callable[[Any, Arrays], Arrays]:
    """Returns step(params, batch) -> sums over a batch, to be compiled; see make_train_step.

    Rows whose batch["valid"] (bool [B]) is False do not count. With C < 5 classes top-5 is top-C. `predictions` adds
    "predicted" int32 [B] and its "probability" float32 [B].
    """

    def step(params: Any, batch: Arrays) -> Arrays:
        model = nnx.merge(graphdef, whole(params))
        logits = model(normalize(shown_images(batch, model.image_size), tuple(mean), tuple(std)))
        label, valid = batch["label"], batch["valid"]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        _, best = jax.lax.top_k(logits, min(5, logits.shape[-1]))
        hits = (best == label[:, None]) & valid[:, None]
        sums = {
            "loss": jnp.sum(jnp.where(valid, loss, 0.0)),
            "top1": jnp.sum(hits[:, 0]),
            "top5": jnp.sum(hits),
            "images": jnp.sum(valid),
        }
        if not predictions:
            return sums
        probability = jnp.max(jax.nn.softmax(logits), axis=-1)
        return sums | {"valid": valid, "predicted": best[:, 0], "probability": probability}

    return step
