"""Exact top-1, top-5 and loss over a whole split: every image counts once, whatever the batch and devices."""

import collections
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from convit_jax.training.distributed import Everywhere
from convit_jax.training.sharding import put_batch

AHEAD = 2  # steps that the host is ahead of the device: hides the host's work, keeps few batches in memory


def evaluate(
    models: Mapping[str, Any],
    batches: Iterable[dict[str, np.ndarray]],
    eval_step: Callable[[Any, Any, Any], Any],
    zero: dict[str, jax.Array],
    mesh: Mesh,
    *,
    stopped: Callable[[], object] = lambda: False,
    progress: Callable[[int], object] = lambda batches: None,
) -> dict[str, dict[str, float]] | None:
    """Evaluates one or several sets of weights in one pass over the images.

    Args:
      models: {name: parameters}.
      batches: this process's rows of each batch, from `loader.batches`.
      eval_step: compiled `step.make_eval_step`.
      zero: `step.eval_metrics()`, on the devices.
      mesh: devices.
      stopped: called before each batch, by all processes alike; ends the evaluation when true.
      progress: called with the number of batches that are done.

    Returns:
      {name: {"top1": per cent, "top5": per cent, "loss": mean, "images": count}}, or None if stopped.

    Raises:
      UserError: no image could be read.
    """
    sums = dict.fromkeys(models, zero)
    under_way: collections.deque[Any] = collections.deque()
    for number, batch in enumerate(batches):
        if stopped():
            return None
        on_devices = put_batch(batch, mesh)
        sums = {name: eval_step(params, sums[name], on_devices) for name, params in models.items()}
        del batch, on_devices  # the loader shares their memory with its workers
        under_way.append(sums)
        if len(under_way) > AHEAD:
            jax.block_until_ready(under_way.popleft())
            progress(number + 1 - AHEAD)
    results = {}
    for name, counts in jax.device_get(sums).items():
        loss, best, best5, images = (counts[key].item() for key in ("loss", "top1", "top5", "images"))
        if not images:
            raise Everywhere("none of the test images can be read: restore them, or set another data.dir.")
        results[name] = {
            "top1": 100 * best / images,
            "top5": 100 * best5 / images,
            "loss": loss / images,
            "images": images,
        }
    return results
