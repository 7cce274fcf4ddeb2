"""Training images as the training step sees them, to look at before a long run."""

import jax
import numpy as np
from ml_collections import ConfigDict

from convit_jax.training.plan import Plan
from convit_jax.training.step import Arrays, augmented, step_keys

IMAGES, STEPS = 6, 6
SHOWN = 0.05  # smallest share in a caption: label smoothing gives every class one

Pictures = list[list[tuple[np.ndarray, str]]]  # rows of images, float32 [H, W, 3] in 0..1, with captions


def preview_augmentation(config: ConfigDict, plan: Plan) -> Pictures:
    """Returns what the first steps would train on if the first images were their batch: a row of images for each step.

    They are augmented and mixed; a caption has the two largest soft labels.
    """
    repeats, names = config.data.repeats, plan.train.source.class_names

    @jax.jit
    def augment(batch: Arrays, step: int) -> tuple[jax.Array, jax.Array]:
        return augmented(batch, step_keys(config.seed, step), config, plan.model["num_classes"])

    def caption(target: np.ndarray) -> str:
        largest = np.argsort(-target)[:2]
        return "\n".join(f"{100 * target[label]:.0f}% {names[label]}" for label in largest if target[label] > SHOWN)

    rows = []
    for step in range(STEPS):
        batch = plan.train([repeats * number + step % repeats for number in range(IMAGES)])
        images, targets = jax.device_get(augment({name: batch[name] for name in ("image", "label")}, step))
        images = np.clip(images * np.float32(config.data.std) + np.float32(config.data.mean), 0, 1)
        rows.append([(image, caption(target)) for image, target in zip(images, targets, strict=True)])
    return rows
