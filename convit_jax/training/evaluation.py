"""Exact top-1, top-5 and loss over a whole split: every image counts once, whatever the batch and devices."""

import collections

import jax

from convit_jax.training.distributed import Everywhere
from convit_jax.training.sharding import put_batch

AHEAD = 2  # steps that the host may be ahead of the device: enough to hide it, few batches in memory


def evaluate(models, batches, eval_step, zero, mesh, *, stopped=lambda: False, progress=lambda batches: None):
    """Evaluate one or several sets of weights in one pass over the images.

    Args:
      models: {name: params}. batches: iterable of this process's rows, as `loader.batches` gives them.
      eval_step: of step.make_eval_step, compiled. zero: step.eval_metrics(), on the devices.
      stopped: asked before each batch, by all processes alike. progress: told how many batches are done.

    Returns:
      {name: {"top1": per cent, "top5": per cent, "loss": mean, "images": count}}, or None if stopped.

    Raises:
      UserError: no image could be read.
    """
    sums = dict.fromkeys(models, zero)
    under_way = collections.deque()
    try:
        for number, batch in enumerate(batches):
            if stopped():
                return None
            batch = put_batch(batch, mesh)
            sums = {name: eval_step(params, sums[name], batch) for name, params in models.items()}
            del batch  # its memory, which the loader shares with its workers, is free when the step is done
            under_way.append(jax.tree.leaves(sums)[0])
            if len(under_way) > AHEAD:
                jax.block_until_ready(under_way.popleft())
                progress(number + 1 - AHEAD)
    except Exception:
        if jax.process_count() == 1 and stopped():  # the signal reached the loader's workers as well
            return None
        raise
    results = {}
    for name, counts in jax.device_get(sums).items():
        loss, best, best5, images = (counts[key].item() for key in ("loss", "top1", "top5", "images"))
        if not images:
            raise Everywhere("none of the test images could be read: restore them, or set another data.dir.")
        results[name] = {
            "top1": 100 * best / images,
            "top5": 100 * best5 / images,
            "loss": loss / images,
            "images": images,
        }
    return results
