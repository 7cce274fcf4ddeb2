"""Top-1, top-5 and loss of weights over a whole test split, exactly.

    python -m convit_jax.evaluate --checkpoint=convit_small --config=configs/convit_s.py \\
        --config.data.dir=IMAGENET
    python -m convit_jax.evaluate --checkpoint=runs/convit_s
    python -m convit_jax.evaluate --checkpoint=runs/convit_s --mask=position_embedding
    python -m convit_jax.evaluate --checkpoint=runs/convit_s --gates=content --gpsa_layers=5

Preprocessing (crop, interpolation, mean, std) comes with the weights, the images from the `data` section
of --config; a run directory's own config serves if none is given, on all devices at hand, and
--config.data.dir=IMAGES, or another field, changes it. The last two are Tables 5 and 6 of the paper: what is
lost without the position embedding, and with gates forced to position or content only.
"""

import dataclasses
import math
import sys
import time
from pathlib import Path

from absl import flags

from convit_jax.cli import define_weights, launch, load_weights
from convit_jax.config import load_run_config
from convit_jax.errors import UserError
from convit_jax.rundir import is_run


def define():
    define_weights()
    flags.DEFINE_enum("mask", None, ["position_embedding"], "Set it to 0 (Table 5).")
    flags.DEFINE_enum("gates", None, ["position", "content"], "Force sigma(lambda) to 1 or to 0 (Table 6).")
    flags.DEFINE_integer("gpsa_layers", None, "In so many of the first GPSA layers; all of them.")


def main(_):
    """Evaluate what the flags say."""
    import jax
    from ml_collections import ConfigDict

    from convit_jax.data.loader import EvalExample, Unreadable, batches
    from convit_jax.data.sources import digest, open_source
    from convit_jax.data.subsample import select
    from convit_jax.training.distributed import (
        check_same,
        comparable,
        in_turns,
        introduce,
        is_first,
        phase,
        say,
        several,
        together,
        warn,
    )
    from convit_jax.training.evaluation import evaluate
    from convit_jax.training.loop import use_compilation_cache
    from convit_jax.training.sharding import make_mesh, put_same, replicated
    from convit_jax.training.step import eval_metrics, make_eval_step
    from convit_jax.weights.pretrained import describe, fingerprint, match_classes
    from convit_jax.weights.run import agree_on_checkpoint

    values = flags.FLAGS
    introduce(make_mesh(-1, 1))  # all devices, which several processes must take
    phase("reading the weights")
    which = agree_on_checkpoint(values.checkpoint, values.which, values.ema)
    with together():
        loaded = load_weights(which=which)
        params, changes = intervene(loaded.params())
        config = values.config or own_config(values.checkpoint)
        mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    if not several():  # several would have to find the same programs, see clusters.md
        use_compilation_cache(config.compilation_cache)

    # ---- The images, and what the weights call their classes -------------------------------
    phase("reading the lists of images")
    source = in_turns(lambda: open_source(config.data, "test"))
    names = source.class_names[: config.data.num_classes]
    with together():
        new_labels, remark = match_classes(names, loaded)
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
    check_same(
        {
            **comparable(config),
            **{f"the weights' {name}": value for name, value in loaded.settings.items()},
            **{f"the weights' {name}": value for name, value in dataclasses.asdict(how).items()},
            "the digest of the weights": fingerprint({"labels": new_labels, "params": params}),
            "the digest of the images' classes, labels and names": digest(source),
        },
        "start all processes with the same command, weights and images",
    )
    example = EvalExample(source, indices, loaded.settings["image_size"], how.crop_ratio, how.interpolation)
    batch_size = math.ceil(min(config.eval_batch_size, len(indices)) / mesh.size) * mesh.size
    steps = math.ceil(len(indices) / batch_size)
    rows = batches(
        example,
        batch_size=batch_size,
        start=0,
        stop=steps,
        workers=min(config.data.workers, steps // 4),
        process=jax.process_index(),
        processes=jax.process_count(),
    )
    say(describe(loaded))
    if changes:
        say(f"Changed for this evaluation: {'; '.join(changes)}")
    say(f"{len(indices):,} images of {len(names)} classes in batches of {batch_size}; {how.words()}")

    # ---- One pass over them ----------------------------------------------------------------
    graphdef, _ = loaded.network
    normalization = ConfigDict({"data": {"mean": how.mean, "std": how.std}})
    step = jax.jit(make_eval_step(graphdef, normalization), out_shardings=replicated(mesh))
    zero = jax.jit(eval_metrics, out_shardings=replicated(mesh))()
    params = put_same(params, jax.tree.map(lambda _: replicated(mesh), params))
    unreadable = Unreadable(source, config.data.max_unreadable, say if is_first() else warn)

    def relabelled(batch):
        return {**unreadable.take(batch), "label": new_labels[batch["label"]]}

    progress = Progress(len(indices), batch_size) if is_first() else lambda batches: None
    phase("the first batch, which is compiled")
    result = evaluate({"": params}, map(relabelled, rows), step, zero, mesh, progress=progress)[""]
    progress(steps)
    say("top-1 {top1:.3f}  top-5 {top5:.3f}  loss {loss:.3f}  images {images}".format(**result))


def own_config(checkpoint):
    """The config of a run directory; UserError if the weights are none."""
    if not is_run(checkpoint):
        raise UserError(
            f"{checkpoint} is not a run directory, so its images are unknown: add "
            "--config=configs/convit_s.py --config.data.dir=IMAGES, or another config with a data section."
        )
    return load_run_config(Path(checkpoint).expanduser())


def intervene(params):
    """(the parameters as --mask and --gates change them, what was changed in words)."""
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
        raise UserError(
            "--gpsa_layers says in how many layers --gates holds: add --gates=position or content."
        )
    return params, changes


class Progress:
    """Tells how far an evaluation is: a live line in a terminal, a line every tenth of it in a file."""

    def __init__(self, images, batch_size):
        self.images, self.batch_size, self.said = images, batch_size, 0
        self.began, self.first = time.monotonic(), 0  # images done when the clock was started

    def __call__(self, batches):
        """So many batches are done."""
        done = min(batches * self.batch_size, self.images)
        seconds = time.monotonic() - self.began
        rate = (done - self.first) / max(seconds, 1e-9)
        if self.first == 0:  # the first batch waited for the compiler
            self.began, self.first = time.monotonic(), done
        if sys.stdout.isatty():
            print(f"\r\x1b[K{done}/{self.images} images  {rate:.0f} img/s", end="", flush=True)
            if done == self.images:
                print()
        elif done == self.images or done - self.said >= self.images / 10:
            print(f"{done}/{self.images} images  {rate:.0f} img/s", flush=True)
            self.said = done


if __name__ == "__main__":
    launch("evaluate", main, define=define, config="", processes=True)
