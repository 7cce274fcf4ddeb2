"""The parameters that a run directory has kept; reads only, so the run may still be going."""

import jax
from orbax.checkpoint import v1 as ocp

from convit_jax.errors import UserError
from convit_jax.rundir import read_metrics


def read_run(directory, which="best", ema=False):
    """The parameters in a run directory, a nested dict of numpy arrays.

    Each of several processes reads by itself and waits for no other, which may find nothing there.

    Args:
      which: a step, "latest", or "best": by val_top1 among the checkpoints that are there, which are the
        latest and the best by val_top1.
      ema: take the moving average of the parameters; "best" is then that of these two with the better
        val_ema_top1, though another step, which was not kept, may have had a better one.

    Raises:
      UserError: no checkpoint yet, or no average was kept.
    """
    step = which if isinstance(which, int) else find_step(directory, which, ema)
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
                    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
                    shapes["state"][part],
                )
                return jax.device_get(ocp.load(path, wanted)["state"][part])
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"the checkpoint {path} cannot be read ({reason}): take another one with which=latest or best."
        ) from error
    raise UserError(
        f"the run in {directory} kept no moving average of its weights: leave ema out, or train with "
        "--config.optim.ema_decay=0.9999."
    )


def find_step(directory, which, ema):
    """The step of the checkpoint "best" or "latest" in a run directory; arguments as of read_run."""
    if which not in ("best", "latest"):
        raise UserError(f"there is no checkpoint {which!r}: choose best or latest.")
    steps = [int(path.name) for path in (directory / "checkpoints").iterdir() if path.name.isdigit()]
    if not steps:
        raise UserError(f"the run in {directory} has saved no checkpoint yet: let it train longer.")
    score = "val_ema_top1" if ema else "val_top1"
    top1 = {line["step"]: line[score] for line in read_metrics(directory / "metrics.jsonl") if score in line}
    return max(steps, key=lambda step: (top1.get(step, -1.0) if which == "best" else 0.0, step))
