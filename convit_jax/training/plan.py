"""What a config amounts to, worked out and checked before anything expensive starts."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from convit_jax.config import check_config, default_config, left_to_weights, load_run_config
from convit_jax.data.examples import EvalExample, Slots, TrainExample
from convit_jax.data.sources import digest, open_source
from convit_jax.data.subsample import evaluated_subset, training_subset
from convit_jax.errors import UserError
from convit_jax.models.variants import settings_of
from convit_jax.weights.pretrained import as_arguments, load


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that a run needs to know about its config."""

    model: dict[str, Any]  # settings of VisionTransformer
    train: TrainExample
    test: EvalExample
    epochs: float  # of the subset, for the schedule; may be fractional
    total_steps: int  # of the run, which may end before the schedule
    eval_steps: int  # of one evaluation
    eval_at: frozenset[int]  # the steps after which to evaluate
    batch_size: int  # global
    eval_batch_size: int  # global
    warmup_epochs: float  # as `epochs`

    @functools.cached_property
    def image_lists(self) -> list[str]:
        """Digests of all classes, labels and names: of the training split, of the test split."""
        return [digest(self.train.source), digest(self.test.source)]

    def epoch(self, step: int) -> float:
        """Returns the epochs done after a step."""
        return step * self.batch_size / self.train.slots.epoch_length


def follow_weights(config: ConfigDict, run: Path | None = None) -> ConfigDict:
    """Returns a config with the values of the fields that it leaves to the weights of init_from.

    They come from these weights, or from the directory of a `run` that continues.
    """
    check_config(config)
    names = left_to_weights(config)
    if not names:
        return config
    if not config.init_from:
        raise UserError(f"init_from is None, but the config takes {names[-1]} from its weights: set init_from.")
    values: Any
    if run:
        values = load_run_config(run)
    else:
        loaded = load(config.init_from, image_size=config.model.image_size, num_heads=config.model.num_heads)
        values = {"model": as_arguments(loaded.settings), "data": dataclasses.asdict(loaded.preprocessing)}
    config = config.copy_and_resolve_references()
    for section, _, name in (name.partition(".") for name in names):
        config[section][name] = values[section].get(name)
    return config


def make_plan(config: ConfigDict, *, devices: int, on_device: bool = False) -> Plan:
    """Checks a config for this number of devices and works it out; reads the lists of images.

    on_device: `device_resizes`, which starts JAX's backend. Without it the host resizes.
    """
    check_run(config, devices=devices)
    source, held_out = open_source(config.data, "train"), open_source(config.data, "test")
    indices = training_subset(config, source)
    test_indices = evaluated_subset(config, held_out)
    classes = config.data.num_classes or len(source.class_names)
    model = settings_of(config.model, num_classes=classes)
    if model["num_classes"] < classes:
        raise UserError(
            f"model.num_classes is {model['num_classes']}, but the data has {classes} classes: "
            "leave it out, or keep fewer classes with data.num_classes."
        )
    freeze, depth = config.optim.freeze, model["depth"]
    if freeze not in ("none", "backbone", *range(1, depth + 1)):
        raise UserError(f"optim.freeze is {freeze!r}: choose none, backbone or 1 to {depth} leading blocks.")
    slots = Slots(indices, config.seed, config.data.repeats)
    batch_size = config.batch_size or min(64, len(indices) // 8 * 8 or len(indices))
    _check_divisible(batch_size, devices, config.accumulate)
    eval_batch_size = math.ceil(min(config.eval_batch_size, len(test_indices)) / devices) * devices
    size, group = model["image_size"], batch_size // devices
    canvas, eval_canvas = canvas_sides(config.data, size) if on_device else (0, 0)
    if on_device and canvas < (fewest := _fewest_pixels(config.data, size)):
        raise UserError(
            f"data.canvas is {canvas}, but {config.data.repeats} crops of {max(size)} pixels need {fewest}: raise it, "
            "or set data.resize=host."
        )

    def steps_of(epochs: float) -> int:
        return math.ceil(round(epochs * slots.epoch_length / batch_size, 6))

    longer = 1.0
    if config.data.keep_total_images:
        longer = int((source.labels < classes).sum()) / len(indices)
    epochs, every = round(config.epochs * longer, 6), config.eval_every * longer
    total = steps_of(epochs)
    if config.steps is not None:
        total = min(total, config.steps)
    eval_at = {steps_of(n * every) for n in range(1, math.ceil(epochs / every))}
    return Plan(
        model=model,
        train=TrainExample(source, slots, size, config.augment.crop, config.data.interpolation, canvas, group),
        test=EvalExample(held_out, test_indices, size, config.data.crop_ratio, config.data.interpolation, eval_canvas),
        epochs=epochs,
        total_steps=total,
        eval_steps=math.ceil(len(test_indices) / eval_batch_size),
        eval_at=frozenset({step for step in eval_at if step < total} | {total}),
        batch_size=batch_size,
        eval_batch_size=eval_batch_size,
        warmup_epochs=epochs / 20 if config.optim.warmup_epochs is None else config.optim.warmup_epochs,
    )


def device_resizes(config: ConfigDict, interpolation: str, kept: Mapping[str, Any] | None = None) -> bool:
    """Returns whether the device crops and resizes the images of a config (data.resize), with this Pillow filter.

    kept: run.json of a run that continues, which keeps what it began with.
    """
    if config.data.resize == "auto":
        if kept is not None:
            return kept.get("resize") == "device"
        return jax.default_backend() != "cpu" and config.augment.crop == "resized" and interpolation == "bicubic"
    if config.data.resize == "device" and interpolation != "bicubic":
        raise UserError(
            f"the images are resized with {interpolation}, but data.resize=device is bicubic: set it to host."
        )
    return config.data.resize == "device"


def canvas_sides(data: ConfigDict, size: tuple[int, int]) -> tuple[int, int]:
    """Returns the sides of the canvases of training and of evaluation, which shows less of an image.

    data is config.data, size the (height, width) of the model's images.
    """
    side = data.canvas or max(512, _fewest_pixels(data, size))
    return side, max(side * 3 // 4, *size)


def _fewest_pixels(data: ConfigDict, size: tuple[int, int]) -> int:
    """The side of a canvas that holds all crops of an image."""
    return math.ceil(math.sqrt(data.repeats)) * max(size)


def check_run(config: ConfigDict, *, devices: int) -> None:
    """Raises UserError for a config that cannot work with any data."""
    check_config(config)
    if config.batch_size is not None:
        _check_divisible(config.batch_size, devices, config.accumulate)
    for name in ("mean", "std"):
        if len(config.data[name]) != 3:
            raise UserError(f"data.{name} is {config.data[name]}: give 3 numbers, for red, green and blue.")
    if config.data.name == "digits" and config.data.dir:
        raise UserError("data.dir is set, but data.name=digits reads no files: set data.name=folder.")
    for name, default in default_config().distill.items():
        of_soft = name == "temperature" and config.distill.kind == "hard"
        if config.distill[name] != default and (of_soft or not config.distill.teacher):
            needs = "distill.kind=soft" if of_soft else "distill.teacher"
            raise UserError(f"distill.{name} is set, which only {needs} uses: add that, or leave it out.")


def _check_divisible(size: int, devices: int, parts: int) -> None:
    if size % (devices * parts):
        raise UserError(
            f"batch_size is {size}, which {devices} devices x {parts} micro-batches do not divide: use a "
            f"multiple of {devices * parts}, or fewer devices (mesh.data)."
        )
