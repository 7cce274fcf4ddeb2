"""Training images as the training step sees them, to look at before a long run."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from convit_jax.data.augment import stage_keys
from convit_jax.data.images import decode
from convit_jax.data.randaugment import Op, draw_operations
from convit_jax.training.plan import Plan
from convit_jax.training.step import augmented, step_keys

Pictures = list[list[tuple[np.ndarray, str]]]  # rows of images with captions

IMAGES, VERSIONS = 4, 6  # images, and crops of each
STEPS = 4


def preview_augmentation(config: ConfigDict, plan: Plan) -> tuple[Pictures, Pictures]:
    """Returns what augmentation makes of the first images of a training, as rows of (crops, mixed).

    A row of crops is an image, then its crops before mixing with RandAugment's operations. A row of mixed is a
    step, with images after mixup and cutmix and their soft labels.
    """
    slots, repeats = plan.train.slots, config.data.repeats
    source: Any = plan.train.source
    firsts = [repeats * number for number in range(IMAGES)]  # slots in which a new image begins
    batch = plan.train([first + version % repeats for first in firsts for version in range(VERSIONS)])
    before, steps = augment_batch(config, batch, plan.model["num_classes"])
    captioned = list(zip(before, list_operations(config, len(before)), strict=True))
    crops = []
    for row, first in enumerate(firsts):
        index = slots.example(first)
        whole = np.asarray(decode(source[index], source.name(index)))
        name = source.class_names[source.labels[index]]
        crops.append([(whole, name), *captioned[row * VERSIONS : (row + 1) * VERSIONS]])
    spread = np.linspace(0, len(before) - 1, 1 + VERSIONS).astype(int)
    labels = batch["label"]
    mixed = [
        [(images[n], format_shares(targets[n], labels[[n, -1 - n]], source.class_names)) for n in spread]
        for images, targets in steps  # the partner of n is -1 - n
    ]
    return crops, mixed


def augment_batch(
    config: ConfigDict, batch: Mapping[str, np.ndarray], num_classes: int
) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """Returns images [B, H, W, 3] in 0..1: step 0 before mixing, and (images, soft labels) of each step."""
    unmixed = config.copy_and_resolve_references()
    unmixed.augment.update(mixup=0.0, cutmix=0.0)

    @jax.jit
    def run(batch: dict[str, jax.Array], step: int) -> list[tuple[jax.Array, jax.Array]]:
        keys = step_keys(config.seed, step)
        return [augmented(batch, keys, each, num_classes) for each in (unmixed, config)]

    def to_visible(images: np.ndarray) -> np.ndarray:
        return np.clip(images * np.float32(config.data.std) + np.float32(config.data.mean), 0, 1)

    pixels = {name: batch[name] for name in ("image", "label")}
    steps = [jax.device_get(run(pixels, step)) for step in range(STEPS)]
    return to_visible(steps[0][0][0]), [(to_visible(images), targets) for _, (images, targets) in steps]


def list_operations(config: ConfigDict, rows: int) -> list[str]:
    """Returns the names of RandAugment's operations for each row in step 0, one per line."""
    aug = config.augment
    if aug.policy != "randaugment":
        return [""] * rows
    ops = jax.device_get(draw_operations(stage_keys(step_keys(config.seed, 0)[0])["policy"], rows, aug)[0])
    names = [[Op(op).name.title().replace("_", "") for op in row if op != Op.NONE] for row in ops]
    return ["\n".join(row) for row in names]


def format_shares(target: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> str:
    """Returns the shares that an image and its partner have of a soft target [C], one per line."""
    above_smoothing = [label for label in dict.fromkeys(labels.tolist()) if target[label] > target.min() + 0.005]
    return "\n".join(f"{100 * target[label]:.0f}% {class_names[label]}" for label in above_smoothing)
