"""What a run amounts to: the facts in run.json and the text before the first step."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from convit_jax.config import default_config, flatten
from convit_jax.models.kernels import cudnn_available
from convit_jax.models.variants import TIMM_NAME, count_macs, count_params
from convit_jax.training.distill import Teacher
from convit_jax.training.optimizer import count_trained, run_schedule
from convit_jax.training.plan import Plan

# FLOP/s in dense bfloat16, from the data sheets. The first words found in JAX's name of a device count.
PEAKS = {
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Returns the peak FLOP/s of a device such as "NVIDIA H100 80GB HBM3", or None if it is unknown."""
    if dtype != "bfloat16":
        return None
    return next((flops for words, flops in PEAKS.items() if re.search(rf"\b{words}\b", device_kind)), None)


def facts(config: ConfigDict, plan: Plan, params: Any, mesh: Mesh, teacher: Teacher | None) -> dict[str, Any]:
    """Returns the contents of run.json; params may be shapes."""
    macs = count_macs(plan.model)
    labels = plan.train.source.labels[plan.train.slots.indices]
    per_class = np.bincount(labels)[np.unique(labels)]
    schedule = run_schedule(config, plan)
    epochs = plan.epoch(plan.total_steps)
    return {
        "model": config.model.name,
        "image_size": list(plan.model["image_size"]),
        "dtype": plan.model["dtype"],
        "attention": plan.model["attention"],
        "scan_unroll": plan.model["scan_unroll"],
        "resize": "device" if plan.train.canvas else "host",
        "parameters": count_params(params),
        "trained_parameters": count_trained(params, config.optim),
        "macs": macs,
        "flops": 2 * macs,
        "data": config.data.name,
        "classes": plan.model["num_classes"],
        "class_names": list(plan.train.source.class_names)[: plan.model["num_classes"]],
        "train_images": len(labels),
        "train_images_per_class": [int(per_class.min()), int(per_class.max())],
        "train_images_available": len(plan.train.source.labels),
        "test_images": len(plan.test.indices),
        "image_lists": plan.image_lists,
        "steps": plan.total_steps,
        "batch_size": plan.batch_size,
        "images": plan.total_steps * plan.batch_size,
        "epochs": epochs,
        "warmup_epochs": plan.warmup_epochs,
        "warmup_steps": plan.warmup_epochs * plan.total_steps / epochs,
        # A short run may end before its warm-up does.
        "peak_learning_rate": float(jnp.max(jax.vmap(schedule)(jnp.arange(plan.total_steps)))),
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "device_kind": mesh.devices.flat[0].device_kind,
        "jax": jax.__version__,
        "teacher": teacher and teacher.facts,
    }


def describe_run(config: ConfigDict, run: Mapping[str, Any], workdir: Path) -> str:
    """Returns the text before the first step; run: of `facts`."""
    height, width = run["image_size"]
    mesh = ", ".join(f"{axis} {size}" for axis, size in run["mesh"].items())
    processes = f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""
    each = " to ".join(f"{count:,}" for count in sorted({*run["train_images_per_class"]}))
    default = flatten(default_config())
    changed = [  # the lines below have what None became
        f"{name}={value}".replace(", ", ",")
        for name, value in flatten(config).items()
        if value is not None and value != default.get(name)
    ]
    trained = f" ({run['trained_parameters']:,} trained)" if run["trained_parameters"] < run["parameters"] else ""
    peak, highest = config.optim.lr * run["batch_size"] / 512, run["peak_learning_rate"]
    reached = f", of which these steps reach {highest:.4g}" if highest < 0.99 * peak else ""
    lines = [
        f"Config   {' '.join(changed) or 'as configs/default.py'}",
        f"Model    {run['model']}, {run['parameters']:,} parameters{trained}, {height} x {width} px, {run['dtype']}",
        f"Cost     {run['macs'] / 1e9:.4g} GMACs = {run['flops'] / 1e9:.4g} GFLOPs per image, forward",
        f"Data     {run['data']}, {run['train_images']:,} of {run['train_images_available']:,} training images "
        f"({each} per class), {run['classes']} classes, {run['test_images']:,} test images",
        f"Training {run['steps']:,} steps of {run['batch_size']} images, {run['epochs']:.4g} epochs",
        f"Rate     optim.lr {config.optim.lr:g} x {run['batch_size']} / 512 = {peak:.4g}, "
        f"after {run['warmup_epochs']:g} epochs of warm-up{reached}",
        f"Devices  {run['devices']} x {run['device_kind']} ({mesh}){processes}, jax {run['jax']}",
    ]
    lines += [f"Caution  {caution}" for caution in _cautions(config, run)]
    if teacher := run["teacher"]:
        lines.append("; ".join([f"Teacher  {teacher['source']}, {teacher['network']}", *teacher["changes"]]))
    return "\n".join([*lines, f"Run      {workdir}"])


def _cautions(config: ConfigDict, run: Mapping[str, Any]) -> Iterator[str]:
    """What the user may not want."""
    if run["attention"] == "cudnn" and not cudnn_available():
        yield "XLA computes attention: cudnn needs an NVIDIA GPU, Ampere or later"
    timm = TIMM_NAME.fullmatch(config.model.name)
    side = timm and timm["side"]
    if side and [int(side)] * 2 != run["image_size"]:
        yield f"the model's name says {side} px: set model.image_size={side} for images of that size"
    if run["batch_size"] > run["train_images"]:
        yield f"batch_size {run['batch_size']:,} is larger than the {run['train_images']:,} training images: lower it"
    if 0 < run["warmup_steps"] < 1 and config.optim.warmup_epochs is not None:
        yield "the warm-up is shorter than one step: raise optim.warmup_epochs, or lower batch_size"
    if run["warmup_steps"] > run["steps"]:
        yield (
            f"the warm-up takes {run['warmup_steps']:,.0f} steps, but the run only {run['steps']:,}: lower "
            "optim.warmup_epochs"
        )
