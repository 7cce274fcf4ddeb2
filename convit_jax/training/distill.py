"""Distillation: a student learns from the labels and from a teacher, a network that is already trained.

    loss = (1 - alpha) cross-entropy(class head, labels) + alpha D(distillation head, teacher)

D is losses.distillation_loss. A model without distillation token learns both with its one head, as in the
paper's Table 4. The teacher sees the student's augmented images, in evaluation mode.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from convit_jax.errors import UserError
from convit_jax.models.vit import VisionTransformer
from convit_jax.training.losses import distillation_loss, soft_cross_entropy
from convit_jax.training.plan import Plan
from convit_jax.weights.pretrained import describe_weights, fingerprint, load, match_classes, with_behaviour


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A teacher without its parameters, which a step takes as an argument.

    Attributes:
      graphdef: of the network, in evaluation mode.
      settings: config.distill.
      columns: int32 [C], the teacher's label of each of the student's classes; None if they are the same.
      renormalise: (scale, shift), float32 [3] each, from the student's inputs to the teacher's; None if they
        are the same.
      facts: for run.json.
    """

    graphdef: nnx.GraphDef
    settings: ConfigDict
    columns: np.ndarray | None
    renormalise: tuple[np.ndarray, np.ndarray] | None
    facts: dict[str, Any]

    def logits(self, params: Any, images: jax.Array) -> jax.Array:
        """Returns float32 [B, C] for the student's images, float32 [B, H, W, 3]."""
        if self.renormalise is not None:
            scale, shift = self.renormalise
            images = images * scale + shift
        logits = nnx.merge(self.graphdef, params)(images)
        return logits if self.columns is None else logits[:, self.columns]

    def loss(
        self, params: Any, student: VisionTransformer, images: jax.Array, targets: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns the loss of a student.

        Args:
          params: of the teacher.
          student: the model that learns.
          images: float32 [B, H, W, 3], normalised.
          targets: soft labels, float32 [B, C].
          key: of the student's dropout and stochastic depth.

        Returns:
          (loss, the teacher's part D of it, logits [B, C] as in evaluation: the mean of the heads), float32.
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


def load_teacher(
    config: ConfigDict, plan: Plan, which: str | int = "best"
) -> tuple[Teacher | None, dict[str, Any] | None]:
    """Loads the teacher of a run, with its position embedding resized to the student's images.

    Args:
      config: of the run; without distill.teacher there is no teacher.
      plan: of the run.
      which: checkpoint of a run directory, as of load_pretrained.

    Returns:
      (teacher, its parameters as a nested dict of numpy arrays), or (None, None).

    Raises:
      UserError: no usable weights, or a network that cannot teach this student.
    """
    source, student = config.distill.teacher, plan.model
    if not source:
        return None, None
    names = plan.train.source.class_names[: config.data.num_classes]
    if student["num_classes"] != len(names):
        raise UserError(
            f"model.num_classes is {student['num_classes']}, but a teacher knows only the {len(names)} "
            "classes of the data: leave it out."
        )
    try:
        loaded = load(source, image_size=student["image_size"], which=which)
        loaded = with_behaviour(loaded, dtype=student["dtype"], attention=student["attention"])
        changes = list(loaded.changes)
        columns, remarks = _columns(names, loaded)
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
    renormalise = _renormalisation(config.data, loaded.preprocessing)
    if renormalise:
        changes.append("images renormalised for it")
    network, changes = describe_weights(loaded), changes + remarks
    facts = {"source": source, "network": network, "changes": changes, "weights": weights}
    return Teacher(loaded.network[0], config.distill, columns, renormalise, facts), params


def _renormalisation(ours: Any, theirs: Any) -> tuple[np.ndarray, np.ndarray] | None:
    """(scale, shift) from images normalised with our mean and std to theirs; None if these are the same."""
    (mean, std), (to_mean, to_std) = ((np.array(s.mean), np.array(s.std)) for s in (ours, theirs))
    if (mean == to_mean).all() and (std == to_std).all():
        return None
    # (x std + mean - to_mean) / to_std of a normalised x
    return (std / to_std).astype(np.float32), ((mean - to_mean) / to_std).astype(np.float32)


def _columns(names: tuple[str, ...], loaded: Any) -> tuple[np.ndarray | None, list[str]]:
    """(the teacher's label of each class of the data, or None if they are the same; remarks)."""
    known = loaded.settings["num_classes"]
    if not loaded.class_names and known != len(names):
        raise UserError(
            f"{loaded.source} has {known} classes without names, but the data has {len(names)}: give a "
            "teacher of the same classes."
        )
    columns, remark = match_classes(names, loaded)
    same = np.array_equal(columns, np.arange(known))
    return None if same else columns, [remark] if remark else []
