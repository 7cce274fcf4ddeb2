"""Losses of a training, float32 scalars or one value per image."""

import jax
import jax.numpy as jnp


def soft_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Returns -sum_c targets log softmax(logits), float32 [B], for float32 [B, C] twice."""
    return -jnp.sum(targets * jax.nn.log_softmax(logits.astype(jnp.float32)), axis=-1)


def distillation_loss(logits: jax.Array, teacher_logits: jax.Array, *, kind: str, temperature: float) -> jax.Array:
    """Returns how far a student is from its teacher, float32 [] (Touvron et al. 2021, section 4).

    hard: cross-entropy with the class that the teacher predicts.
    soft: T^2 KL(softmax(teacher / T) || softmax(student / T)), divided by images x classes as in DeiT's code.
    """
    if kind == "hard":
        best = jax.nn.one_hot(jnp.argmax(teacher_logits, axis=-1), logits.shape[-1])
        return jnp.mean(soft_cross_entropy(logits, best))
    ours, theirs = (jax.nn.log_softmax(x.astype(jnp.float32) / temperature) for x in (logits, teacher_logits))
    return temperature**2 * jnp.mean(jnp.exp(theirs) * (theirs - ours))
