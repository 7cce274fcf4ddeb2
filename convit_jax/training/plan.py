"""What a config amounts to, worked out and checked before anything expensive starts."""

import dataclasses
import functools
import math

from convit_jax.config import check_config, default_config, flatten
from convit_jax.data.examples import EvalExample, Slots, TrainExample
from convit_jax.data.sources import digest, open_source
from convit_jax.data.subsample import select, training_subset
from convit_jax.errors import UserError
from convit_jax.models.variants import model_settings

CHANNELS = 3  # of images as they are read


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that a run needs to know about its config.

    model: settings of VisionTransformer. train, test: examples by slot. epochs: of the subset, for
    the schedule. total_steps, eval_steps: of the run and of one evaluation. eval_at: the steps after
    which to evaluate.
    """

    model: dict
    train: TrainExample
    test: EvalExample
    epochs: float
    total_steps: int
    eval_steps: int
    eval_at: frozenset
    batch_size: int

    @functools.cached_property
    def image_lists(self):
        """[of the training split, of the test split]: a digest of all classes, labels and names."""
        return [digest(self.train.source), digest(self.test.source)]

    def epoch(self, step):
        """Epochs done after a step, a fraction."""
        return step * self.batch_size / self.train.slots.epoch_length


def make_plan(config, *, devices):
    """Check a config and work it out.

    Args:
      config: as configs/default.py describes it.
      devices: number of devices that share a batch.

    Raises:
      UserError: anything in the config that cannot work, with the remedy.
    """
    check(config, devices=devices)
    source, held_out = open_source(config.data, "train"), open_source(config.data, "test")
    indices = training_subset(config, source)
    classes = len(source.class_names)
    test_indices = select(
        held_out.labels, held_out.names, classes=classes, num_classes=config.data.num_classes
    )
    classes = config.data.num_classes or classes
    model = model_settings(**model_arguments(config, classes))
    if model["num_classes"] < classes:
        raise UserError(
            f"model.num_classes is {model['num_classes']}, but the data has {classes} classes: "
            "leave it out, or keep fewer classes with data.num_classes."
        )
    if not len(test_indices):
        raise UserError(f"none of the {classes} classes has an image for the test: add some.")
    slots = Slots(indices, config.seed, config.data.repeats)

    def steps_of(epochs):
        return math.ceil(round(epochs * slots.epoch_length / config.batch_size, 6))

    longer = 1.0
    if config.data.keep_total_images:
        longer = int((source.labels < classes).sum()) / len(indices)
    epochs = round(config.epochs * longer, 6)
    total = steps_of(epochs)
    if config.steps is not None:
        total = min(total, config.steps)
    every = config.eval_every * longer
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


def model_arguments(config, num_classes):
    """The arguments of create_model in config.model, without those left to the model."""
    given = {name: value for name, value in config.model.items() if value is not None}
    return {"num_classes": num_classes, **given}


def check(config, *, devices):
    """Refuse values that no data could make work; arguments and UserError as of make_plan."""
    check_config(config)
    for name, parts in (("batch_size", config.accumulate), ("eval_batch_size", 1)):
        share = devices * parts
        if config[name] % share:
            lower, upper = config[name] // share * share, -(-config[name] // share) * share
            near = f"{upper}" if lower == 0 else f"{lower} or {upper}"
            micro = f" x {parts} micro-batches" if parts > 1 else ""
            raise UserError(
                f"{name} is {config[name]}, which {devices} devices{micro} do not divide: use {near}, "
                "or fewer devices with mesh.data."
            )
    for name in ("mean", "std"):
        if len(config.data[name]) != CHANNELS:
            raise UserError(
                f"data.{name} is {config.data[name]}: it must have {CHANNELS} numbers: red, green and blue."
            )
    check_distillation(config.distill)
    if config.data.name == "digits" and config.data.dir:
        raise UserError("data.dir is set but data.name is digits, which needs none: set data.name=folder.")


def check_distillation(distill):
    """Refuse values of a config's section that cannot work, or that nothing would come of."""
    if distill.kind == "hard" and distill.temperature != 1:
        raise UserError(
            f"distill.temperature is {distill.temperature}, but only kind=soft has one: add "
            "distill.kind=soft, or leave it out."
        )
    for name, usual in flatten(default_config()).items():
        section, _, field = name.partition(".")
        if section == "distill" and not distill.teacher and distill[field] != usual:
            raise UserError(
                f"{name} is {distill[field]!r}, but there is no teacher: add distill.teacher or leave it out."
            )
