"""Exact top-1, top-5 and loss over a whole split: every image counts once, whatever the batch and devices."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from convit_jax.data.examples import Batch, EvalExample, TrainExample, Unreadable
from convit_jax.data.loader import batches, batches_at_once, check_shared_memory
from convit_jax.data.sources import digest, open_source
from convit_jax.data.subsample import evaluated_subset
from convit_jax.progress import Progress
from convit_jax.training import distributed
from convit_jax.training.distributed import phase, say
from convit_jax.training.plan import canvas_sides, device_resizes
from convit_jax.training.sharding import put_batch, put_same, replicated
from convit_jax.training.step import Arrays, make_eval_step
from convit_jax.weights.formats import Pretrained
from convit_jax.weights.pretrained import fingerprint, match_classes

ROWS = ("valid", "predicted", "probability")  # what an evaluation step returns of each row, if asked to
AHEAD = 2  # steps that the host is ahead of the device: hides the host's work, keeps few batches in memory


def evaluate(
    models: Mapping[str, Any],
    batches: Iterable[Batch],
    eval_step: Callable[[Any, Arrays], Arrays],
    mesh: Mesh,
    stopped: Callable[[], object] = lambda: False,
) -> dict[str, dict[str, Any]] | None:
    """Evaluates one or several sets of weights, {name: parameters}, in one pass over `our_batches`.

    Returns {name: {"top1": per cent, "top5": per cent, "loss": mean, "images": count, and ROWS if eval_step returns
    them}}, or None if `stopped`, which all processes call before each batch, ended it.
    """
    parts: list[dict[str, Arrays]] = []  # sums over each batch, on the devices
    for batch in batches:
        if stopped():
            return None
        on_devices = put_batch(batch, mesh)
        parts.append({name: eval_step(params, on_devices) for name, params in models.items()})
        del batch, on_devices  # the loader shares their memory with its workers
        jax.block_until_ready(parts[-AHEAD - 1 : -AHEAD])
    results: dict[str, dict[str, Any]] = {}
    for name in models:
        of_batches = jax.device_get([part[name] for part in parts])
        loss, best, best5, images = (sum(s[key] for s in of_batches) for key in ("loss", "top1", "top5", "images"))
        if not images:
            raise distributed.Everywhere("none of the test images can be read: restore them, or change data.dir.")
        counts = {"top1": 100 * int(best) / int(images), "top5": 100 * int(best5) / int(images)}
        rows = {key: np.concatenate([s[key] for s in of_batches]) for key in ROWS if key in of_batches[0]}
        results[name] = counts | {"loss": float(loss) / int(images), "images": int(images)} | rows
    return results


def our_batches(
    unreadable: Unreadable, example: TrainExample | EvalExample, workers: int, batch_size: int, steps: range
) -> Generator[Batch, None, None]:
    """Yields this process's rows of the batches of some steps; close it to end the loader."""
    rows = batches(
        example,
        batch_size=batch_size,
        start=steps.start,
        stop=steps.stop,
        workers=_useful(workers, steps),
        process=jax.process_index(),
        processes=jax.process_count(),
    )
    with contextlib.closing(rows):
        yield from map(unreadable.take, rows)


def shared_memory(example: TrainExample | EvalExample, workers: int, batch_size: int, steps: range) -> int:
    """Returns the bytes of shared memory that `our_batches` needs at most."""
    arrays = example.rows(batch_size // jax.process_count()).arrays()
    return batches_at_once(_useful(workers, steps)) * sum(array.nbytes for array in arrays.values())


def _useful(workers: int, steps: range) -> int:
    """The number of workers that are worth starting, which takes seconds."""
    return min(workers, len(steps) // 4)


def evaluate_weights(
    config: ConfigDict, loaded: Pretrained, params: dict[str, Any], mesh: Mesh, *, predictions: bool = False
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Evaluates parameters of weights on the test images of a config, with the weights' preprocessing.

    Returns the numbers, and with `predictions` the "image" (its name), "label", "predicted" and "probability" of each
    readable image, [images]; the labels are the weights'.
    """
    classes, how = config.data.num_classes, loaded.preprocessing
    phase("reading the lists of images")
    source = distributed.first_then_others(lambda: open_source(config.data, "test"))
    with distributed.together():
        labels, remark = match_classes(source.class_names[:classes], loaded)  # the weights' label of each class
        indices = evaluated_subset(config, source)
    if remark:
        say(remark)
    distributed.check_same(
        {
            **distributed.comparable(config),
            "what the weights are": {**loaded.settings, **dataclasses.asdict(how)},
            "the digest of the weights": fingerprint({"labels": labels, "params": params}),
            "the digest of the images' classes, labels and names": digest(source),
        },
        "start all processes with the same command, weights and images",
    )
    size = loaded.settings["image_size"]
    canvas = canvas_sides(config.data, size)[1] if device_resizes(config, how.interpolation) else 0
    images = EvalExample(source, indices, size, how.crop_ratio, how.interpolation, canvas)
    count = len(indices)
    batch_size = math.ceil(min(config.eval_batch_size, count) / mesh.size) * mesh.size
    say(f"{count:,} images of {len(labels)} classes in batches of {batch_size}; {how}")
    progress = Progress("images", count, every=0.1, enabled=distributed.is_first())
    tell = progress.say if distributed.is_first() else distributed.warn
    unreadable = Unreadable(source, config.data.max_unreadable, tell)
    workers, steps = config.data.workers, range(math.ceil(count / batch_size))
    check_shared_memory(shared_memory(images, workers, batch_size, steps))
    rows = our_batches(unreadable, images, workers, batch_size, steps)

    def relabelled() -> Iterator[Batch]:
        for number, batch in enumerate(rows):
            progress.update(number * batch_size, "")
            yield {**batch, "label": labels[batch["label"]]}

    step = make_eval_step(loaded.network[0], how.mean, how.std, predictions=predictions)
    compiled = jax.jit(step, out_shardings=replicated(mesh))
    params = put_same(params, jax.tree.map(lambda _: replicated(mesh), params))
    phase("the first batch, which is compiled")
    results = evaluate({"": params}, relabelled(), compiled, mesh)
    progress.close()
    assert results is not None  # nothing stops it
    result = results[""]
    if not predictions:
        return result, {}
    valid, predicted, probability = (result.pop(name) for name in ROWS)  # with padding
    indices = indices[valid[:count]]
    found = {"image": np.array([source.name(index) for index in indices]), "label": labels[source.labels[indices]]}
    return result, found | {"predicted": predicted[valid], "probability": probability[valid]}
