"""One training step and one evaluation step, as pure functions of plain pytrees.

The state is {"step", "params", "opt_state"} and, with EMA, "ema". Metrics are sums that stay on
the device from step to step. All randomness comes from (seed, step) and the row in the batch.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from convit_jax.data.augment import augment, normalize
from convit_jax.data.mixup import mix_batch
from convit_jax.training.optimizer import ema_update

FINE = jnp.iinfo(jnp.int32).max  # bad_step of a window in which every loss was finite
TRAIN_STREAM = 0x7261696E  # keeps the keys of training apart from those of the weights, which count from 0


def step_keys(seed, step):
    """The keys of a step's augmentation, of its mixing, and of stochastic depth and dropout.

    seed: int, or uint32 []; below 2^32.
    """
    seed_key = jax.random.fold_in(jax.random.key(seed), TRAIN_STREAM)
    return jax.random.split(jax.random.fold_in(seed_key, step), 3)


def train_metrics(*, distilled=False):
    """The sums of an empty window; bad_step is the first step with a loss or gradient that is not finite.

    distilled: of a run with a teacher, with the part of the loss that comes from it.
    """
    zero = jnp.int32(0)
    lr = jnp.float32(0)  # of the last step
    sums = {"loss": jnp.float32(0), "correct": zero, "images": zero, "lr": lr, "bad_step": jnp.int32(FINE)}
    return {**sums, "distill_loss": jnp.float32(0)} if distilled else sums


def eval_metrics():
    """The sums before the first batch of an evaluation."""
    zero = jnp.int32(0)
    return {"loss": jnp.float32(0), "top1": zero, "top5": zero, "images": zero}


def new_state(params, optimizer, *, ema):
    """State of step 0 around a nested dict of parameters."""
    state = {"step": jnp.int32(0), "params": params, "opt_state": optimizer.init(params)}
    if ema:
        state["ema"] = jax.tree.map(jnp.copy, params)
    return state


def soft_cross_entropy(logits, targets):
    """-sum_c targets log softmax(logits), float32 [B], for float32 [B, C] twice."""
    return -jnp.sum(targets * jax.nn.log_softmax(logits.astype(jnp.float32)), axis=-1)


def augmented(batch, keys, config, num_classes):
    """What a step with these keys trains on: images float32 [B, H, W, 3], soft labels [B, num_classes]."""
    aug, mean, std = config.augment, tuple(config.data.mean), tuple(config.data.std)
    images = augment(batch["image"], keys[0], aug, mean=mean, std=std)
    return mix_batch(images, batch["label"], keys[1], aug, num_classes)


def make_train_step(
    graphdef, optimizer, schedule, config, num_classes, whole=lambda tree: tree, teacher=None
):
    """(state, metrics, batch, seed, teacher's params) -> (state, metrics), to be jitted (state donated).

    batch: {"image": uint8 [B, H, W, 3], "label": int32 [B]}. seed: uint32 [], an argument so that runs that
    differ in nothing else share the compiled program. whole: puts parameters that are cut over
    devices together for the forward and backward pass (their gradients are cut again). teacher: a
    distill.Teacher, whose parameters the step is then given.
    """
    optim = config.optim
    parts = config.accumulate

    def loss_fn(params, images, targets, key, teacher_params):
        """Mean loss, and sums over the images."""
        model, sums = nnx.merge(graphdef, whole(params)), {}
        if teacher is None:
            logits = model(images, key=key)
            loss = jnp.mean(soft_cross_entropy(logits, targets))
        else:
            loss, part, logits = teacher.loss(whole(teacher_params), model, images, targets, key)
            sums["distill_loss"] = part * images.shape[0]
        sums["correct"] = jnp.sum(jnp.argmax(logits, -1) == jnp.argmax(targets, -1))
        return loss, sums

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)

    def accumulated(params, images, targets, key, teacher_params):
        """Mean over `parts` micro-batches; each takes rows from every device's share of the batch."""
        if parts == 1:
            return grad_fn(params, images, targets, key, teacher_params)

        def split(x):
            return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)

        def add(total, part):
            return jax.tree.map(jnp.add, total, grad_fn(params, *part, teacher_params)), None

        inputs = (split(images), split(targets), jax.random.split(key, parts))
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(grad_fn, params, *jax.tree.map(lambda x: x[0], inputs), teacher_params),
        )
        ((loss, sums), grads), _ = jax.lax.scan(add, zeros, inputs)
        return (loss / parts, sums), jax.tree.map(lambda grad: grad / parts, grads)

    def step(state, metrics, batch, seed, teacher_params=None):
        keys = step_keys(seed, state["step"])
        with jax.named_scope("augmentation"):  # scopes name parts in profiles
            images, targets = augmented(batch, keys, config, num_classes)
        (loss, sums), grads = accumulated(state["params"], images, targets, keys[2], teacher_params)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
            params = optax.apply_updates(state["params"], updates)
        finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(grads))
        rows = images.shape[0]
        metrics = {
            **{name: metrics[name] + value for name, value in sums.items()},
            "loss": metrics["loss"] + loss * rows,
            "images": metrics["images"] + rows,
            "lr": schedule(state["step"]),
            "bad_step": jnp.where(
                finite, metrics["bad_step"], jnp.minimum(metrics["bad_step"], state["step"])
            ),
        }
        new = {"step": state["step"] + 1, "params": params, "opt_state": opt_state}
        if "ema" in state:
            new["ema"] = ema_update(state["ema"], params, optim.ema_decay)
        return new, metrics

    return step


def make_eval_step(graphdef, config, whole=lambda tree: tree):
    """(params, metrics, batch) -> metrics; rows whose "valid" is False do not count.

    Loss is the cross-entropy with the plain label; top-5 is top-C where there are C < 5 classes.
    """

    def step(params, metrics, batch):
        images = normalize(batch["image"], tuple(config.data.mean), tuple(config.data.std))
        logits = nnx.merge(graphdef, whole(params))(images)
        label, valid = batch["label"], batch["valid"]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, label)
        _, best = jax.lax.top_k(logits, min(5, logits.shape[-1]))
        hits = (best == label[:, None]) & valid[:, None]
        return {
            "loss": metrics["loss"] + jnp.sum(jnp.where(valid, loss, 0.0)),
            "top1": metrics["top1"] + jnp.sum(hits[:, 0]),
            "top5": metrics["top5"] + jnp.sum(hits),
            "images": metrics["images"] + jnp.sum(valid),
        }

    return step
