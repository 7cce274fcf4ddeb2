"""What a run amounts to: the text before the first step, and the facts in run.json."""

import math
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from convit_jax.models.variants import count_macs, count_params
from convit_jax.training.optimizer import peak_learning_rate, run_schedule


def facts(config, plan, params, mesh_shape, device_kind, teacher):
    """What a run amounts to, for people and for run.json.

    params: nested dict of arrays, or of their shapes. mesh_shape: {"data": n, "fsdp": m}. device_kind:
    their name, as JAX gives it. teacher: a distill.Teacher, or None.
    """
    macs = count_macs(plan.model)
    labels = plan.train.source.labels[plan.train.slots.indices]
    per_class = np.bincount(labels)[np.unique(labels)]
    images = plan.total_steps * config.batch_size
    return {
        "model": config.model.name,
        "image_size": list(plan.model["image_size"]),
        "dtype": plan.model["dtype"],
        "parameters": count_params(params),
        "macs": macs,
        "flops": 2 * macs,
        "data": config.data.name,
        "classes": plan.model["num_classes"],
        "class_names": list(plan.train.source.class_names)[: plan.model["num_classes"]],
        "train_images": len(labels),
        "train_images_per_class": [int(per_class.min()), int(per_class.max())],
        "train_images_available": len(plan.train.source),
        "test_images": len(plan.test.indices),
        "image_lists": plan.image_lists,
        "steps": plan.total_steps,
        "batch_size": config.batch_size,
        "images": images,
        "epochs": plan.epoch(plan.total_steps),
        "peak_learning_rate": largest_rate(config, plan),
        "devices": math.prod(mesh_shape.values()),
        "mesh": dict(mesh_shape),
        "device_kind": device_kind,
        "jax": jax.__version__,
        "teacher": teacher and teacher.facts,
    }


def describe(config, run, workdir):
    """The text printed before the first step: the effective config, what runs, on what, for how long."""
    height, width = run["image_size"]
    mesh = ", ".join(f"{axis} {size}" for axis, size in run["mesh"].items())
    fewest, most = run["train_images_per_class"]
    each = f"{fewest:,}" if fewest == most else f"{fewest:,} to {most:,}"
    rows = [
        ("Model", f"{run['model']}, {run['parameters']:,} parameters, {height} x {width} px, {run['dtype']}"),
        ("Cost", f"{run['macs'] / 1e9:.4g} GMACs = {run['flops'] / 1e9:.4g} GFLOPs forward, an image"),
        (
            "Data",
            f"{run['data']}, {run['train_images']:,} of {run['train_images_available']:,} training images, "
            f"{each} in each of {run['classes']} classes, {run['test_images']:,} for the test",
        ),
        ("Training", f"{run['steps']:,} steps of {run['batch_size']} images, {run['epochs']:.4g} epochs"),
        ("Rate", f"{run['peak_learning_rate']:.4g} at its peak{_of_rate(config, run)}"),
        ("Devices", f"{run['devices']} x {run['device_kind']} ({mesh}), jax {run['jax']}"),
        ("Run", f"{workdir}"),
    ]
    if teacher := run["teacher"]:
        words = "; ".join([f"{teacher['source']}, {teacher['network']}", *teacher["changes"]])
        rows.insert(-1, ("Teacher", words))
    sections = [("", {k: v for k, v in config.items() if not isinstance(v, ConfigDict)})]
    sections += [(f"{k}.", dict(v)) for k, v in config.items() if isinstance(v, ConfigDict)]
    settings = "\n".join(
        textwrap.fill(
            "  ".join(f"{prefix}{name}={_short(value)}" for name, value in sorted(fields.items())),
            width=110,
            initial_indent="  ",
            subsequent_indent="  ",
            break_on_hyphens=False,
        )
        for prefix, fields in sections
    )
    return "\n".join(f"{name:9}{text}" for name, text in rows) + f"\nConfig\n{settings}"


def largest_rate(config, plan):
    """The largest learning rate of the steps of a run: about the configured peak, or less in a short run."""
    schedule = run_schedule(config, plan)
    return float(jnp.max(jax.vmap(schedule)(jnp.arange(plan.total_steps))))


def _of_rate(config, run):
    """The end of the line about the rate: what the config asks for, and whether the run gets near it."""
    asked = peak_learning_rate(config.optim, config.batch_size)
    words = f", of {asked:.4g} = {config.optim.lr:g} x batch / 512"
    if run["peak_learning_rate"] > 0.9 * asked:  # at the end of the warm-up the cosine is a little below it
        return words
    return f"{words} that the warm-up of {config.optim.warmup_epochs:g} epochs leads to in a longer run"


def _short(value):
    return str(value).replace(" ", "") if not isinstance(value, float) else f"{value:g}"
