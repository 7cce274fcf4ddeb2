"""What a config amounts to, worked out and checked before anything expensive starts."""

import dataclasses
import functools
import math
from typing import Any

from ml_collections import ConfigDict

from convit_jax.config import check_config, default_config
from convit_jax.data.examples import EvalExample, Slots, TrainExample
from convit_jax.data.sources import digest, open_source
from convit_jax.data.subsample import select, training_subset
from convit_jax.errors import UserError
from convit_jax.models.variants import model_settings


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that a run needs to know about its config.

    Attributes:
      model: settings of VisionTransformer.
      train, test: examples by slot.
      epochs: of the subset, for the schedule; may be fractional.
      total_steps: of the run, which may end before the schedule.
      eval_steps: of one evaluation.
      eval_at: the steps after which to evaluate.
      batch_size: global.
    """

    model: dict[str, Any]
    train: TrainExample
    test: EvalExample
    epochs: float
    total_steps: int
    eval_steps: int
    eval_at: frozenset[int]
    batch_size: int

    @functools.cached_property
    def image_lists(self) -> list[str]:
        """Digests of all classes, labels and names: of the training split, of the test split."""
        return [digest(self.train.source), digest(self.test.source)]

    def epoch(self, step: int) -> float:
        """Returns the epochs done after a step."""
        return step * self.batch_size / self.train.slots.epoch_length


def make_plan(config: ConfigDict, *, devices: int) -> Plan:
    """Checks a config and works it out.

    Args:
      config: with the fields of configs/default.py.
      devices: number of devices that share a batch.

    Raises:
      UserError: the config cannot work, or its data cannot be read.
    """
    check_run(config, devices=devices)
    source, held_out = open_source(config.data, "train"), open_source(config.data, "test")
    indices = training_subset(config, source)
    available = len(source.class_names)
    test_indices = select(held_out.labels, held_out.names, classes=available, num_classes=config.data.num_classes)
    classes = config.data.num_classes or available
    model = model_settings(**model_arguments(config, classes))
    if model["num_classes"] < classes:
        raise UserError(
            f"model.num_classes is {model['num_classes']}, but the data has {classes} classes: "
            "leave it out, or keep fewer classes with data.num_classes."
        )
    if not len(test_indices):
        raise UserError(f"none of the {classes} classes has a test image: add some.")
    slots = Slots(indices, config.seed, config.data.repeats)

    def steps_of(epochs: float) -> int:
        return math.ceil(round(epochs * slots.epoch_length / config.batch_size, 6))

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
        train=TrainExample(source, slots, model["image_size"], config.augment.crop),
        test=EvalExample(held_out, test_indices, model["image_size"], config.data.crop_ratio),
        epochs=epochs,
        total_steps=total,
        eval_steps=math.ceil(len(test_indices) / config.eval_batch_size),
        eval_at=frozenset({step for step in eval_at if step < total} | {total}),
        batch_size=config.batch_size,
    )


def model_arguments(config: ConfigDict, num_classes: int) -> dict[str, Any]:
    """Returns the arguments of create_model that config.model sets; num_classes: if it sets none."""
    given = {name: value for name, value in config.model.items() if value is not None}
    return {"num_classes": num_classes, **given}


def check_run(config: ConfigDict, *, devices: int) -> None:
    """Raises UserError for a config that cannot work with any data; arguments as of make_plan."""
    check_config(config)
    for name, parts in (("batch_size", config.accumulate), ("eval_batch_size", 1)):
        share = devices * parts
        if config[name] % share:
            lower, upper = config[name] // share * share, -(-config[name] // share) * share
            near = f"{lower} or {upper}" if lower else f"{upper}"
            micro = f" x {parts} micro-batches" if parts > 1 else ""
            raise UserError(
                f"{name} is {config[name]}, which {devices} devices{micro} do not divide: use {near}, "
                "or fewer devices with mesh.data."
            )
    for name in ("mean", "std"):
        if len(config.data[name]) != 3:
            raise UserError(f"data.{name} is {config.data[name]}: give 3 numbers, for red, green and blue.")
    if config.data.name == "digits" and config.data.dir:
        raise UserError("data.dir is set, but data.name=digits reads no files: set data.name=folder.")
    _check_distillation(config.distill)


def _check_distillation(distill: ConfigDict) -> None:
    """Raises UserError for fields that would be ignored."""
    if distill.kind == "hard" and distill.temperature != 1:
        raise UserError(
            f"distill.temperature is {distill.temperature}, but only distill.kind=soft uses it: "
            "add distill.kind=soft, or leave it out."
        )
    if not distill.teacher:
        for name, default in default_config().distill.items():
            if distill[name] != default:
                raise UserError(
                    f"distill.{name} is {distill[name]!r}, but there is no teacher: add distill.teacher or "
                    "leave it out."
                )
