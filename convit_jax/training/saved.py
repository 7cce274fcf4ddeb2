"""What a run directory has kept: the parameters of a checkpoint, with the config and facts of the run.

Reads only, so that it may look into a run that is still going.
"""

import json

import jax
from orbax.checkpoint import v1 as ocp

from convit_jax.errors import UserError
from convit_jax.training.metrics import read_metrics


def read_run(directory, which="best", ema=False):
    """(params, config, facts) of a run directory: nested dicts, of numpy arrays and as in its JSON files.

    Args:
      which: "best", by val_top1 among the checkpoints that are there, or "latest".
      ema: take the moving average of the parameters; the best is then by its own top-1.

    Raises:
      UserError: no checkpoint yet, or no average was kept.
    """
    if which not in ("best", "latest"):
        raise UserError(f"there is no checkpoint {which!r}: choose best or latest.")
    steps = [int(path.name) for path in (directory / "checkpoints").iterdir() if path.name.isdigit()]
    if not steps:
        raise UserError(f"the run in {directory} has saved no checkpoint yet: let it train longer.")
    score = "val_ema_top1" if ema else "val_top1"
    top1 = {line["step"]: line[score] for line in read_metrics(directory / "metrics.jsonl") if score in line}
    step = max(steps, key=lambda step: (top1.get(step, -1.0) if which == "best" else 0.0, step))

    path = directory / "checkpoints" / str(step)
    shapes = ocp.metadata(path).metadata
    part = "ema" if ema else "params"
    if part not in shapes["state"]:
        raise UserError(
            f"the run in {directory} kept no moving average of its weights: leave ema out, or train with "
            "--config.optim.ema_decay=0.9999."
        )
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    skip = jax.tree.map(lambda _: ..., shapes)  # leaves that are not read
    wanted = {**skip, "state": {**skip["state"]}}
    wanted["state"][part] = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), shapes["state"][part]
    )
    params = jax.device_get(ocp.load(path.absolute(), wanted)["state"][part])
    config, facts = (json.loads((directory / name).read_text()) for name in ("config.json", "run.json"))
    return params, config, facts
