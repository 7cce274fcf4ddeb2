"""Distillation: a student learns from the labels and from a teacher, a network that is trained already.

    loss = (1 - alpha) cross-entropy(class head, labels) + alpha D(distillation head, teacher)
    hard: D = cross-entropy with the class that the teacher gives
    soft: D = T^2 KL(softmax(teacher / T) || softmax(student / T)), divided by images x classes

as DeiT's code has it (Touvron et al. 2021, section 4). A model without distillation token learns both with
its one head, as in the paper's Table 4. The teacher sees the student's augmented images, in evaluation mode.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convit_jax.errors import UserError
from convit_jax.training.distributed import say
from convit_jax.training.step import soft_cross_entropy
from convit_jax.weights.pretrained import describe_weights, fingerprint, load, match_classes, with_behaviour


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A teacher without its parameters, which a step takes as an argument.

    settings: config.distill. columns: int32 [C], its label of each of the student's classes. scale, shift:
    float32 [3], what makes its inputs of the student's; None where they are the same. facts: for run.json.
    """

    graphdef: nnx.GraphDef
    settings: object
    columns: np.ndarray | None
    scale: np.ndarray | None
    shift: np.ndarray | None
    facts: dict

    def logits(self, params, images):
        """float32 [B, C] for the student's images, float32 [B, H, W, 3]."""
        if self.scale is not None:
            images = images * self.scale + self.shift
        logits = nnx.merge(self.graphdef, params)(images)
        return logits if self.columns is None else logits[:, self.columns]

    def loss(self, params, student, images, targets, key):
        """What a distilled student is trained with.

        Args:
          params: of the teacher. student: a VisionTransformer. images: float32 [B, H, W, 3], normalised.
          targets: soft labels, float32 [B, C]. key: of the student's dropout and stochastic depth.

        Returns:
          (loss, the part of it that comes from the teacher and is weighed with alpha, the student's logits
          as it gives them in evaluation: the mean of its heads).
        """
        if student.distilled:
            for_labels, for_teacher = student.both_logits(images, key=key)
        else:
            for_labels = for_teacher = student(images, key=key)
        alpha = self.settings.alpha
        base = jnp.mean(soft_cross_entropy(for_labels, targets))
        distillation = distillation_loss(
            for_teacher,
            self.logits(params, images),
            kind=self.settings.kind,
            temperature=self.settings.temperature,
        )
        loss = (1 - alpha) * base + alpha * distillation
        return loss, distillation, (for_labels + for_teacher) / 2


def distillation_loss(logits, teacher_logits, *, kind, temperature):
    """D above, a float32 scalar, of logits [B, C] twice; temperature: of kind "soft"."""
    if kind == "hard":
        best = jax.nn.one_hot(jnp.argmax(teacher_logits, axis=-1), logits.shape[-1])
        return jnp.mean(soft_cross_entropy(logits, best))
    ours, theirs = (jax.nn.log_softmax(x.astype(jnp.float32) / temperature) for x in (logits, teacher_logits))
    return temperature**2 * jnp.mean(jnp.exp(theirs) * (theirs - ours))


def load_teacher(config, plan, which="best"):
    """The teacher of a run and its parameters, a nested dict of numpy arrays; (None, None) if it has none.

    Its position embedding is resized to the student's images, its classes are matched by name. which: of a
    run directory's checkpoints, as saved.read_run takes it.

    Raises:
      UserError: nothing usable there, or a network that cannot teach this student.
    """
    source = config.distill.teacher
    if not source:
        return None, None
    student = plan.model
    names = plan.train.source.class_names[: config.data.num_classes]
    if student["num_classes"] != len(names):
        raise UserError(
            f"model.num_classes is {student['num_classes']}, but a teacher tells only the {len(names)} "
            "classes of the data apart: leave it out."
        )
    try:
        loaded = load(source, image_size=student["image_size"], which=which)
        loaded = with_behaviour(loaded, dtype=student["dtype"], attention=student["attention"])
        columns = _columns(names, loaded)
        if loaded.settings["in_chans"] != student["in_chans"]:
            raise UserError(
                f"{source} takes images of {loaded.settings['in_chans']} channels and the student of "
                f"{student['in_chans']}: give another teacher."
            )
        # Without the position embedding: it may have been resized, which rounds differently elsewhere.
        as_trained = {name: tensor for name, tensor in loaded.tensors.items() if name != "pos_embed"}
        weights, params = fingerprint(as_trained), loaded.params()  # both read the file
    except UserError as error:
        raise UserError(f"distill.teacher: {error}") from error
    changes, scale, shift = list(loaded.changes), None, None
    ours = np.array([config.data.mean, config.data.std])
    theirs = np.array([loaded.preprocessing.mean, loaded.preprocessing.std])
    if (ours != theirs).any():  # (x s + m - m') / s' for pixels x s + m
        scale = (ours[1] / theirs[1]).astype(np.float32)
        shift = ((ours[0] - theirs[0]) / theirs[1]).astype(np.float32)
        changes.append("images renormalised for it")
    facts = {
        "source": source,
        "network": describe_weights(loaded),
        "changes": changes,
        "weights": weights,
    }
    return Teacher(loaded.network[0], config.distill, columns, scale, shift, facts), params


def _columns(names, loaded):
    """The teacher's label of each class of the data, or None if they are the same."""
    known = loaded.settings["num_classes"]
    if not loaded.class_names and known != len(names):
        raise UserError(
            f"{loaded.source} tells {known} classes apart and does not say which, but the data has "
            f"{len(names)}: give a teacher of the same classes."
        )
    columns, remark = match_classes(names, loaded)
    if remark:
        say(remark)
    return None if np.array_equal(columns, np.arange(known)) else columns
