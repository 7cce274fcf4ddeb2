"""Training images as the training step sees them, to look at before a long run."""

from collections.abc import Callable

import jax
import numpy as np
from ml_collections import ConfigDict

from convit_jax.data.examples import Batch
from convit_jax.training.plan import Plan
from convit_jax.training.step import augmented, step_keys

Pictures = list[list[tuple[np.ndarray, str]]]  # rows of images with captions

IMAGES, VERSIONS, STEPS = 4, 6, 4  # images, crops of each, steps with mixed images


def preview_augmentation(config: ConfigDict, plan: Plan) -> tuple[Pictures, Pictures]:
    """Returns what augmentation makes of the first images of a training, as rows of (crops, mixed).

    A row of crops has crops of one image before mixing. A row of mixed is a step, with images after mixup and
    cutmix and their soft labels.
    """
    repeats, classes, names = config.data.repeats, plan.model["num_classes"], plan.train.source.class_names
    firsts = [repeats * number for number in range(IMAGES)]  # slots in which a new image begins
    batch = plan.train([first + version % repeats for first in firsts for version in range(VERSIONS)])
    unmixed = config.copy_and_resolve_references()
    unmixed.augment.update(mixup=0.0, cutmix=0.0)
    before, _ = augmenter(unmixed, classes)(batch, 0)
    named = [(image, names[label]) for image, label in zip(before, batch["label"], strict=True)]
    crops = [named[start : start + VERSIONS] for start in range(0, len(named), VERSIONS)]

    def shares(target: np.ndarray, labels: np.ndarray) -> str:
        return "\n".join(f"{100 * target[label]:.0f}% {names[label]}" for label in dict.fromkeys(labels))

    mixed, labels, mix = [], batch["label"], augmenter(config, classes)
    for step in range(STEPS):
        images, targets = mix(batch, step)
        spread = np.linspace(0, len(images) - 1, VERSIONS).astype(int)
        mixed.append([(images[n], shares(targets[n], labels[[n, -1 - n]])) for n in spread])  # -1 - n: its partner
    return crops, mixed


def augmenter(config: ConfigDict, num_classes: int) -> Callable[[Batch, int], tuple[np.ndarray, np.ndarray]]:
    """Returns a function of (batch, step): images [B, H, W, 3] in 0..1 and soft labels [B, C] that it trains on."""
    compiled = jax.jit(lambda batch, step: augmented(batch, step_keys(config.seed, step), config, num_classes))

    def augment(batch: Batch, step: int) -> tuple[np.ndarray, np.ndarray]:
        images, targets = jax.device_get(compiled({name: batch[name] for name in ("image", "label")}, step))
        return np.clip(images * np.float32(config.data.std) + np.float32(config.data.mean), 0, 1), targets

    return augment
