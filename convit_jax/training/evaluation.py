"""Exact top-1, top-5 and loss over a whole split: every image counts once, whatever the batch and devices."""

import collections
import dataclasses
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from convit_jax.data.examples import EvalExample, TrainExample, Unreadable
from convit_jax.data.loader import batches
from convit_jax.data.sources import digest, open_source
from convit_jax.data.subsample import select
from convit_jax.progress import Progress
from convit_jax.training.distributed import (
    Everywhere,
    check_same,
    comparable,
    first_then_others,
    is_first,
    phase,
    say,
    together,
    warn,
)
from convit_jax.training.sharding import put_batch, put_same, replicated
from convit_jax.training.step import eval_metrics, make_eval_step
from convit_jax.weights.formats import Pretrained
from convit_jax.weights.pretrained import fingerprint, match_classes

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


def our_batches(
    example: TrainExample | EvalExample, batch_size: int, first: int, last: int, config: ConfigDict
) -> Generator[dict[str, np.ndarray], None, None]:
    """Returns this process's rows of the batches of steps first .. last - 1."""
    return batches(
        example,
        batch_size=batch_size,
        start=first,
        stop=last,
        workers=min(config.data.workers, (last - first) // 4),  # starting them takes seconds
        process=jax.process_index(),
        processes=jax.process_count(),
    )


# ---- Pretrained weights, on images that they may not have been trained on -------------------


def match_images(config: ConfigDict, loaded: Pretrained, params: dict[str, Any]) -> tuple[EvalExample, np.ndarray]:
    """Opens the test images of a config for weights, the same on all processes.

    Args:
      config: with the `data` section.
      loaded: weights, whose preprocessing is used.
      params: their parameters as they are evaluated, to compare them between processes.

    Returns:
      (the images, the weights' label of each class of the data, int32 [classes]).

    Raises:
      UserError: images that cannot be read, or classes that do not match.
    """
    phase("reading the lists of images")
    source = first_then_others(lambda: open_source(config.data, "test"))
    with together():
        labels, remark = match_classes(source.class_names[: config.data.num_classes], loaded)
        indices = select(
            source.labels,
            source.names,
            classes=len(source.class_names),
            num_classes=config.data.num_classes,
            rule=config.data.subset_rule,
            seed=config.seed,
        )
    if remark:
        say(remark)
    how = loaded.preprocessing
    of_weights = {**loaded.settings, **dataclasses.asdict(how)}
    check_same(
        {
            **comparable(config),
            **{f"the weights' {name}": value for name, value in of_weights.items()},
            "the digest of the weights": fingerprint({"labels": labels, "params": params}),
            "the digest of the images' classes, labels and names": digest(source),
        },
        "start all processes with the same command, weights and images",
    )
    size = loaded.settings["image_size"]
    return EvalExample(source, indices, size, how.crop_ratio, how.interpolation), labels


def evaluate_weights(
    config: ConfigDict,
    loaded: Pretrained,
    params: dict[str, Any],
    images: EvalExample,
    labels: np.ndarray,
    mesh: Mesh,
) -> dict[str, float]:
    """Returns the result of `evaluate` for weights, with what `match_images` returned."""
    count, how = len(images.indices), loaded.preprocessing
    batch_size = math.ceil(min(config.eval_batch_size, count) / mesh.size) * mesh.size
    say(f"{count:,} images of {len(labels)} classes in batches of {batch_size}; {how.words()}")
    rows = our_batches(images, batch_size, 0, math.ceil(count / batch_size), config)
    unreadable = Unreadable(images.source, config.data.max_unreadable, say if is_first() else warn)

    def relabelled() -> Iterator[dict[str, np.ndarray]]:
        for batch in map(unreadable.take, rows):
            yield {**batch, "label": labels[batch["label"]]}

    normalization = ConfigDict({"data": {"mean": how.mean, "std": how.std}})
    step = jax.jit(make_eval_step(loaded.network[0], normalization), out_shardings=replicated(mesh))
    zero = jax.jit(eval_metrics, out_shardings=replicated(mesh))()
    params = put_same(params, jax.tree.map(lambda _: replicated(mesh), params))
    progress = Progress("images", count, every=0.1, enabled=is_first())
    phase("the first batch, which is compiled")

    def show(done: int) -> None:
        progress.update(min(done * batch_size, count), "")

    results = evaluate({"": params}, relabelled(), step, zero, mesh, progress=show)
    progress.close()
    assert results is not None  # nothing stops it
    return results[""]
