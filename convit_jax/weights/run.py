"""Reads the parameters in a run directory. It changes nothing, so the run may still be training."""

from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from convit_jax.errors import UserError
from convit_jax.rundir import checkpoint_steps, read_metrics


def read_run(directory: Path, step: int, ema: bool) -> dict[str, Any]:
    """Returns the parameters in a run's checkpoint, a nested dict of float32 numpy arrays.

    Each of several processes reads by itself and waits for no other.
    """
    path = (directory / "checkpoints" / str(step)).absolute()
    part = "ema" if ema else "params"
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    alone, me = ocp.Context(), ocp.multihost.process_index()
    alone.multiprocessing.primary_host, alone.multiprocessing.active_processes = me, {me}
    try:
        with alone:
            shapes = ocp.metadata(path).metadata
            wanted = jax.tree.map(lambda _: ..., shapes)  # leaves that are not read
            if part in wanted["state"]:
                wanted["state"][part] = jax.tree.map(
                    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), shapes["state"][part]
                )
                return jax.device_get(ocp.load(path, wanted)["state"][part])
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"cannot read {path} ({reason}): try the other one with which=latest or best.") from error
    raise UserError(
        f"the run in {directory} kept no moving average of its weights: leave ema out, or train with "
        "--config.optim.ema_decay=0.9999."
    )


def find_step(directory: Path, which: str, ema: bool) -> int:
    """Returns the step of the checkpoint "latest", or "best" by val_top1 (with `ema` by val_ema_top1)."""
    if which not in ("best", "latest"):
        raise UserError(f"there is no checkpoint {which!r}: choose best or latest.")
    steps = checkpoint_steps(directory)
    if not steps:
        raise UserError(f"the run in {directory} has not saved a checkpoint yet: let it train longer.")
    score = "val_ema_top1" if ema else "val_top1"
    top1 = {line["step"]: line[score] for line in read_metrics(directory / "metrics.jsonl") if score in line}
    return max(steps, key=lambda step: (top1.get(step, -1.0) if which == "best" else 0.0, step))
