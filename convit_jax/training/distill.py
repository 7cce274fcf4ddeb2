"""Distillation: a student learns from the labels and from a teacher, a network that is already trained.

    loss = (1 - alpha) cross-entropy(class head, labels) + alpha D(distillation head, teacher)

D is distillation_loss. A model without distillation token learns both with its one head, as in the
paper's Table 4. The teacher sees the student's augmented images, in evaluation mode.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict

from convit_jax.errors import UserError
from convit_jax.models.vit import VisionTransformer
from convit_jax.training.plan import Plan
from convit_jax.weights.pretrained import describe_weights, fingerprint, load, match_classes, with_behaviour


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A teacher without its parameters, which a step takes as an argument."""

    graphdef: nnx.GraphDef  # in evaluation mode
    settings: ConfigDict  # config.distill
    columns: np.ndarray  # int32 [C], its label of each of the student's classes
    renormalise: tuple[np.ndarray, np.ndarray]  # (scale, shift), float32 [3], from the student's images to its own
    facts: dict[str, Any]  # for run.json

    def logits(self, params: Any, images: jax.Array) -> jax.Array:
        """Returns float32 [B, C] for the student's images, float32 [B, H, W, 3]."""
        scale, shift = self.renormalise
        return nnx.merge(self.graphdef, params)(images * scale + shift)[:, self.columns]

    def loss(
        self, params: Any, student: VisionTransformer, images: jax.Array, targets: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns (loss of a student, D, logits [B, C] as in evaluation: the mean of the heads), float32."""
        if student.distilled:
            for_labels, for_teacher = student.both_logits(images, key=key)
        else:
            for_labels = for_teacher = student(images, key=key)
        alpha, kind, temperature = self.settings.alpha, self.settings.kind, self.settings.temperature
        base = jnp.mean(optax.softmax_cross_entropy(for_labels, targets))
        distillation = distillation_loss(for_teacher, self.logits(params, images), kind=kind, temperature=temperature)
        loss = (1 - alpha) * base + alpha * distillation
        return loss, distillation, (for_labels + for_teacher) / 2


def distillation_loss(logits: jax.Array, teacher_logits: jax.Array, *, kind: str, temperature: float) -> jax.Array:
    """Returns how far a student is from its teacher, float32 [], of float32 [B, C] (Touvron et al. 2021, section 4).

    hard: cross-entropy with the class that the teacher predicts.
    soft: T^2 KL(softmax(teacher / T) || softmax(student / T)), divided by images x classes as in DeiT's code.
    """
    if kind == "hard":
        best = jax.nn.one_hot(jnp.argmax(teacher_logits, axis=-1), logits.shape[-1])
        return jnp.mean(optax.softmax_cross_entropy(logits, best))
    ours, theirs = (jax.nn.log_softmax(x / temperature) for x in (logits, teacher_logits))
    return temperature**2 * jnp.mean(jnp.exp(theirs) * (theirs - ours))


def load_teacher(config: ConfigDict, plan: Plan) -> tuple[Teacher | None, dict[str, Any] | None]:
    """Returns (teacher, its parameters as a nested dict of numpy arrays), or (None, None) without distill.teacher."""
    source, student = config.distill.teacher, plan.model
    if not source:
        return None, None
    names = plan.train.source.class_names[: config.data.num_classes]
    try:
        loaded = load(source, image_size=student["image_size"])
        attention = "xla" if config.model.attention == "auto" else student["attention"]
        loaded = with_behaviour(loaded, dtype=student["dtype"], attention=attention)
        known = loaded.settings["num_classes"]
        if student["num_classes"] != len(names) or not (loaded.class_names or known == len(names)):
            raise UserError(
                f"the data has {len(names)} classes, the student {student['num_classes']} and {source} {known}: leave "
                "model.num_classes out, and give a teacher of the same classes, or one that knows their names."
            )
        columns, remark = match_classes(names, loaded)
        # Without the position embedding: it may have been resized, which rounds differently elsewhere.
        as_trained = {name: tensor for name, tensor in loaded.tensors.items() if name != "pos_embed"}
        weights, params, how = fingerprint(as_trained), loaded.params(), loaded.preprocessing  # reads the file
    except UserError as error:
        raise UserError(f"distill.teacher: {error}") from error
    mean, std, to_mean, to_std = map(np.array, (config.data.mean, config.data.std, how.mean, how.std))
    # (x std + mean - to_mean) / to_std of a normalised x
    renormalise = (std / to_std).astype(np.float32), ((mean - to_mean) / to_std).astype(np.float32)
    same = (mean == to_mean).all() and (std == to_std).all()
    notes = [*loaded.changes, None if same else "images renormalised for it", remark]
    changes = [note for note in notes if note]
    facts = {"source": source, "network": describe_weights(loaded), "changes": changes, "weights": weights}
    return Teacher(loaded.network[0], config.distill, columns, renormalise, facts), params
