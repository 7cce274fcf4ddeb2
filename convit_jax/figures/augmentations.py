"""Training images as the training step sees them, to look at before a long run.

At the top a row per image: the whole image, then crops with all augmentation but mixing, and the names of
RandAugment's operations. Below, the images after mixup and cutmix with their soft labels.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np
from ml_collections import ConfigDict

from convit_jax.data.augment import stage_keys
from convit_jax.data.images import decode
from convit_jax.data.randaugment import Op, draw
from convit_jax.figures.style import save_figure
from convit_jax.training.plan import Plan
from convit_jax.training.step import augmented, step_keys

if TYPE_CHECKING:
    from matplotlib.axes import Axes

IMAGES, VERSIONS = 4, 6  # rows and columns at the top; the first column is the whole image
STEPS = 4  # rows below


def draw_augmentations(config: ConfigDict, plan: Plan, path: Path) -> list[Path]:
    """Draws the first images of a training.

    Args:
      config: of the training.
      plan: of the same.
      path: of the picture; its ending is the format.

    Returns:
      The path written.
    """
    from matplotlib.figure import Figure

    source, slots, repeats = plan.train.source, plan.train.slots, config.data.repeats
    firsts = [repeats * number for number in range(IMAGES)]  # slots in which a new image begins
    batch = plan.train([first + version % repeats for first in firsts for version in range(VERSIONS)])
    before, mixed = augment_batch(config, batch, plan.model["num_classes"])
    captions = list_operations(config, len(before))

    figure = Figure(figsize=(1.4 * (1 + VERSIONS), 1.7 * (IMAGES + STEPS)), layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(IMAGES, STEPS))[:, 0]
    above.suptitle("Images, and their crops after augmentation", fontsize=12)
    for row, panels in enumerate(above.subplots(IMAGES, 1 + VERSIONS)):
        index = slots.example(firsts[row])
        whole = np.asarray(decode(source[index], source.names[index]))
        _show_image(panels[0], whole, source.class_names[source.labels[index]])
        for number, axes in enumerate(panels[1:], start=row * VERSIONS):
            _show_image(axes, before[number], captions[number])

    below.suptitle(f"The first {STEPS} steps with a batch of these {len(before)}, after mixing", fontsize=12)
    spread = np.linspace(0, len(before) - 1, 1 + VERSIONS).astype(int)
    for step, panels in enumerate(below.subplots(STEPS, 1 + VERSIONS)):
        images, targets = mixed[step]
        panels[0].set_ylabel(f"step {step}", fontsize=9)
        for number, axes in zip(spread, panels, strict=True):
            labels = batch["label"][[number, -1 - number]]  # of the image and of its partner
            _show_image(axes, images[number], format_shares(targets[number], labels, source.class_names))
    return save_figure(figure, path.parent, path.stem, [path.suffix[1:]])


def augment_batch(
    config: ConfigDict, batch: Mapping[str, np.ndarray], num_classes: int
) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """Returns images [B, H, W, 3] in 0..1: step 0 before mixing, and (images, soft labels) of each step."""
    mixed, unmixed = config, config.copy_and_resolve_references()
    unmixed.augment.update(mixup=0.0, cutmix=0.0)

    @jax.jit
    def run(batch: dict[str, jax.Array], step: int) -> list[tuple[jax.Array, jax.Array]]:
        keys = step_keys(config.seed, step)
        return [augmented(batch, keys, each, num_classes) for each in (unmixed, mixed)]

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
    key = stage_keys(step_keys(config.seed, 0)[0])["policy"]
    ops, _, _ = jax.device_get(draw(key, rows, aug.magnitude, aug.magnitude_std, aug.num_ops))
    names = [[Op(op).name.title().replace("_", "") for op in row if op != Op.NONE] for row in ops]
    return ["\n".join(row) for row in names]


def format_shares(target: np.ndarray, labels: Sequence[int], class_names: Sequence[str]) -> str:
    """Returns the shares that an image and its partner have of a soft target [C], one per line."""
    above_smoothing = [label for label in dict.fromkeys(labels) if target[label] > target.min() + 0.005]
    return "\n".join(f"{100 * target[label]:.0f}% {class_names[label]}" for label in above_smoothing)


def _show_image(axes: "Axes", image: np.ndarray, caption: str) -> None:
    axes.imshow(image, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    axes.set_title(caption, fontsize=7.5, linespacing=1.1)
