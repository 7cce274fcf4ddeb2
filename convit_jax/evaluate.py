"""Top-1, top-5 and loss of weights over a whole test split, exactly.

    python -m convit_jax.evaluate --checkpoint=convit_small --config=configs/convit_s.py \\
        --config.data.dir=IMAGENET
    python -m convit_jax.evaluate --checkpoint=runs/convit_s
    python -m convit_jax.evaluate --checkpoint=runs/convit_s --mask=position_embedding
    python -m convit_jax.evaluate --checkpoint=runs/convit_s --gates=content --gpsa_layers=5

The preprocessing (crop, interpolation, mean, std) comes with the weights. The images come from the `data`
section of --config; for a run directory from its own config, which --config.data.dir=IMAGES and other
fields change. The last two commands are Tables 5 and 6 of the paper: the accuracy without the position
embedding, and with gates forced to position or content.
"""

import dataclasses
import math
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from convit_jax.cli import define_weights, launch, load_weights
from convit_jax.config import load_run_config
from convit_jax.errors import UserError
from convit_jax.progress import Progress
from convit_jax.rundir import is_run

if TYPE_CHECKING:  # these import JAX
    from jax.sharding import Mesh

    from convit_jax.data.loader import EvalExample
    from convit_jax.weights.formats import Pretrained


def _define_flags() -> None:
    define_weights()
    flags.DEFINE_enum("mask", None, ["position_embedding"], "Set it to 0 (Table 5).")
    flags.DEFINE_enum("gates", None, ["position", "content"], "Force sigma(lambda) to 1 or to 0 (Table 6).")
    flags.DEFINE_integer("gpsa_layers", None, "Number of leading GPSA layers to change; all by default.")


def main(arguments: list[str]) -> None:
    """Evaluates what the flags describe; the last line is "top-1 ...  top-5 ...  loss ...  images ..."."""
    from convit_jax.training.distributed import agree_on_checkpoint, introduce, phase, say, several, together
    from convit_jax.training.setup import use_compilation_cache
    from convit_jax.training.sharding import make_mesh
    from convit_jax.weights.pretrained import describe

    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing to save: ends also one of several processes
    values = flags.FLAGS
    introduce()
    phase("reading the weights")
    which = agree_on_checkpoint(values.checkpoint, values.which, values.ema)
    with together():
        loaded = load_weights(which=which)
        params, changes = _changed(loaded.params())
        config = values.config or _own_config(values.checkpoint)
        mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    if not several():  # see docs/clusters.md
        use_compilation_cache(config.compilation_cache)
    phase("reading the lists of images")
    example, labels = _match(config, loaded, params)
    say(describe(loaded))
    if changes:
        say(f"Changed for this evaluation: {'; '.join(changes)}")
    result = _run(config, loaded, params, example, labels, mesh)
    say("top-1 {top1:.3f}  top-5 {top5:.3f}  loss {loss:.3f}  images {images}".format(**result))


def _changed(params: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(the parameters with --mask and --gates applied, a description of the changes)."""
    from convit_jax.analysis.interventions import force_gates, mask_position_embedding

    values, changes = flags.FLAGS, []
    if values.mask:
        params = mask_position_embedding(params)
        changes.append("position embedding set to 0")
    if values.gates:
        params = force_gates(params, values.gates, values.gpsa_layers)
        total = len(params["gpsa_blocks"]["attn"]["gating_param"])
        sigma = {"position": 1, "content": 0}[values.gates]
        changes.append(
            f"gates of the first {values.gpsa_layers or total} of {total} GPSA layers set to "
            f"{values.gates} only (sigma = {sigma})"
        )
    elif values.gpsa_layers is not None:
        raise UserError("--gpsa_layers needs --gates: add --gates=position or --gates=content.")
    return params, changes


def _own_config(checkpoint: str) -> ConfigDict:
    """The config of a run directory; UserError if the weights are none."""
    if not is_run(checkpoint):
        raise UserError(
            f"{checkpoint} is not a run directory, so its images are unknown: add "
            "--config=configs/convit_s.py --config.data.dir=IMAGES, or another config with a data section."
        )
    return load_run_config(Path(checkpoint).expanduser())


def _match(
    config: ConfigDict, loaded: "Pretrained", params: dict[str, Any]
) -> tuple["EvalExample", np.ndarray]:
    """(the test images, the weights' label of each class of the data), the same on all processes."""
    from convit_jax.data.index import digest
    from convit_jax.data.loader import EvalExample
    from convit_jax.data.sources import open_source
    from convit_jax.data.subsample import select
    from convit_jax.training.distributed import check_same, comparable, first_then_others, say, together
    from convit_jax.weights.pretrained import fingerprint, match_classes

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


def _run(
    config: ConfigDict,
    loaded: "Pretrained",
    params: dict[str, Any],
    example: "EvalExample",
    labels: np.ndarray,
    mesh: "Mesh",
) -> dict[str, float]:
    """Top-1, top-5, loss and number of images, from one pass over the images."""
    import jax

    from convit_jax.data.loader import Unreadable, batches
    from convit_jax.training.distributed import is_first, phase, say, warn
    from convit_jax.training.evaluation import evaluate
    from convit_jax.training.sharding import put_same, replicated
    from convit_jax.training.step import eval_metrics, make_eval_step

    how, images = loaded.preprocessing, len(example.indices)
    batch_size = math.ceil(min(config.eval_batch_size, images) / mesh.size) * mesh.size
    steps = math.ceil(images / batch_size)
    say(f"{images:,} images of {len(labels)} classes in batches of {batch_size}; {how.words()}")
    rows = batches(
        example,
        batch_size=batch_size,
        start=0,
        stop=steps,
        workers=min(config.data.workers, steps // 4),
        process=jax.process_index(),
        processes=jax.process_count(),
    )
    unreadable = Unreadable(example.source, config.data.max_unreadable, say if is_first() else warn)

    def relabelled() -> Iterator[dict[str, np.ndarray]]:
        for batch in map(unreadable.take, rows):
            yield {**batch, "label": labels[batch["label"]]}

    normalization = ConfigDict({"data": {"mean": how.mean, "std": how.std}})
    step = jax.jit(make_eval_step(loaded.network[0], normalization), out_shardings=replicated(mesh))
    zero = jax.jit(eval_metrics, out_shardings=replicated(mesh))()
    params = put_same(params, jax.tree.map(lambda _: replicated(mesh), params))
    progress = Progress("images", images, every=0.1, enabled=is_first())
    phase("the first batch, which is compiled")
    result = evaluate(
        {"": params},
        relabelled(),
        step,
        zero,
        mesh,
        progress=lambda done: progress.update(min(done * batch_size, images), ""),
    )
    progress.close()
    assert result is not None  # nothing stops it
    return result[""]


if __name__ == "__main__":
    launch("evaluate", main, define=_define_flags, config="", processes=True)
