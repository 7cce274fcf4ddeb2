"""Training images as the training step sees them, as a picture to look at before a long run.

Above, each row is one image: whole, then its crops after all that the device does before mixing, with the
operations of RandAugment that were drawn. Below, what mixup and cutmix make of them, with the soft labels.
"""

import jax
import numpy as np

from convit_jax.data.augment import stage_keys
from convit_jax.data.images import decode
from convit_jax.data.randaugment import Op, draw_operations
from convit_jax.errors import UserError
from convit_jax.training.step import augmented, step_keys

IMAGES, VERSIONS = 4, 6  # rows and columns above; the first column is the whole image
STEPS = 4  # rows below


def augmentation_montage(config, plan, path):
    """Draw the first images of a training into a picture.

    Args:
      config: as configs/default.py describes it. plan: its Plan.
      path: of the picture; the ending of the name tells the format.

    Raises:
      UserError: the picture cannot be written.
    """
    from matplotlib.figure import Figure

    source, slots, repeats = plan.train.source, plan.train.slots, config.data.repeats
    firsts = [repeats * number for number in range(IMAGES)]  # slots in which a new image begins
    batch = plan.train([first + version % repeats for first in firsts for version in range(VERSIONS)])
    before, mixed = as_the_step_sees(config, batch, plan.model["num_classes"])
    captions = drawn_operations(config, len(before))

    figure = Figure(figsize=(1.7 * (1 + VERSIONS), 2.1 * (IMAGES + STEPS)), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(IMAGES, STEPS))
    above.suptitle("Images, and their crops after augmentation", fontsize=12)
    for row, panels in enumerate(above.subplots(IMAGES, 1 + VERSIONS)):
        index = slots.example(firsts[row])
        whole = np.asarray(decode(source[index], source.names[index]))
        show(panels[0], whole, source.class_names[source.labels[index]])
        for number, panel in enumerate(panels[1:], start=row * VERSIONS):
            show(panel, before[number], captions[number])

    below.suptitle(f"The first {STEPS} steps with a batch of these {len(before)}, after mixing", fontsize=12)
    spread = np.linspace(0, len(before) - 1, 1 + VERSIONS).astype(int)
    for step, panels in enumerate(below.subplots(STEPS, 1 + VERSIONS)):
        images, targets = mixed[step]
        panels[0].set_ylabel(f"step {step}", fontsize=9)
        for number, panel in zip(spread, panels, strict=True):
            labels = batch["label"][[number, -1 - number]]  # of the image and of its partner
            show(panel, images[number], label_shares(targets[number], labels, source.class_names))
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:  # ValueError: a format that Matplotlib does not know
        raise UserError(f"cannot write the picture {path} ({error}): give another --output.") from error


def as_the_step_sees(config, batch, num_classes):
    """(images before mixing in step 0, [(images, soft labels) of each of the first steps]), in 0..1."""
    mixed, unmixed = config, config.copy_and_resolve_references()
    unmixed.augment.update(mixup=0.0, cutmix=0.0)

    @jax.jit
    def run(batch, step):
        keys = step_keys(config.seed, step)
        return [augmented(batch, keys, each, num_classes) for each in (unmixed, mixed)]

    def visible(images):
        return np.clip(images * np.float32(config.data.std) + np.float32(config.data.mean), 0, 1)

    pixels = {name: batch[name] for name in ("image", "label")}
    steps = [jax.device_get(run(pixels, step)) for step in range(STEPS)]
    return visible(steps[0][0][0]), [(visible(images), targets) for _, (images, targets) in steps]


def drawn_operations(config, rows):
    """What RandAugment does to each row in step 0, one line an operation."""
    aug = config.augment
    if aug.policy != "randaugment":
        return [""] * rows
    key = stage_keys(step_keys(config.seed, 0)[0])["policy"]
    draws = jax.device_get(draw_operations(key, rows, aug))
    names = [list(map(operation_name, *row)) for row in zip(*draws, strict=True)]
    return ["\n".join(filter(None, row)) for row in names]


def operation_name(op, magnitude, sign):
    """An operation with its signed magnitude if it has one, as "Rotate -9.2"; empty for none."""
    if op == Op.NONE:
        return ""
    name = Op(op).name.title().replace("_", "")
    if op in (Op.AUTO_CONTRAST, Op.EQUALIZE, Op.INVERT):
        return name
    if op in (Op.POSTERIZE, Op.SOLARIZE, Op.SOLARIZE_ADD):
        return f"{name} {magnitude:.1f}"
    return f"{name} {sign * magnitude:+.1f}"


def label_shares(target, labels, class_names):
    """The labels of a mixed image with their shares of the target [C], one line each."""
    above_smoothing = [label for label in dict.fromkeys(labels) if target[label] > target.min() + 0.005]
    return "\n".join(f"{100 * target[label]:.0f}% {class_names[label]}" for label in above_smoothing)


def show(panel, image, caption):
    """An image with what stands above it."""
    panel.imshow(image, interpolation="nearest")
    panel.set(xticks=[], yticks=[])
    panel.spines[:].set_visible(False)
    panel.set_title(caption, fontsize=7.5, linespacing=1.1)
