"""Top-1, top-5 and loss of weights over a whole test split, exactly.

    python -m convit_jax.evaluate --checkpoint=convit_small --config=configs/convit_s.py --config.data.dir=IMAGENET
    python -m convit_jax.evaluate --checkpoint=runs/convit_s
    python -m convit_jax.evaluate --checkpoint=runs/convit_s --per_class --predictions=predictions.csv
    python -m convit_jax.evaluate --checkpoint=runs/digits --confusion=confusion.png
    python -m convit_jax.evaluate --checkpoint=runs/convit_s --mask=position_embedding
    python -m convit_jax.evaluate --checkpoint=runs/convit_s --gates=content --gpsa_layers=5

The preprocessing (crop, interpolation, mean, std) comes with the weights. The images come from the `data`
section of --config; for a run directory from its own config, which --config.data.dir=IMAGES and other
fields change. The last two commands are Tables 5 and 6 of the paper: the accuracy without the position
embedding, and with gates forced to position or content.
"""

import csv
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from absl import flags

from convit_jax.cli import define_weights, launch, load_weights, required_config
from convit_jax.errors import UserError
from convit_jax.rundir import atomic_write, check_output, disk_errors


def _define_flags() -> None:
    define_weights()
    flags.DEFINE_enum("mask", None, ["position_embedding"], "Set it to 0 (Table 5).")
    flags.DEFINE_enum("gates", None, ["position", "content"], "Force sigma(lambda) to 1 or to 0 (Table 6).")
    flags.DEFINE_string("predictions", None, "Write a CSV file: image, label, prediction, probability.")
    flags.DEFINE_string("confusion", None, "Draw the confusion matrix into this file; up to 100 classes are named.")
    flags.DEFINE_bool("per_class", False, "Print the top-1 of each class.")
    flags.DEFINE_integer("gpsa_layers", None, "Number of leading GPSA layers to change; all by default.")


def main(arguments: list[str]) -> None:
    """Evaluates what the flags describe."""
    from convit_jax.analysis.interventions import force_gates, mask_position_embedding
    from convit_jax.data.class_names import words
    from convit_jax.figures.style import check_picture, save_figure
    from convit_jax.training.distributed import is_first, phase, say, several, together
    from convit_jax.training.evaluation import evaluate_weights
    from convit_jax.training.setup import use_compilation_cache
    from convit_jax.training.sharding import make_mesh
    from convit_jax.weights.pretrained import describe_weights

    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # ends also one of several processes: nothing to save
    values = flags.FLAGS
    predictions, confusion = (name and Path(name).expanduser() for name in (values.predictions, values.confusion))
    phase("reading the weights")
    with together():
        if confusion:
            check_picture(confusion)
        for path in filter(None, [predictions, confusion] if is_first() else []):
            check_output(path)
        loaded = load_weights(needs_head=True)
        params, changes = loaded.params(), [*loaded.changes]
        if values.mask:
            params = mask_position_embedding(params)
            changes.append("position embedding set to 0")
        if values.gates:
            params = force_gates(params, values.gates, values.gpsa_layers)
            total = len(params["gpsa_blocks"]["attn"]["gating_param"])
            layers = f"the first {values.gpsa_layers or total} of {total} GPSA layers"
            changes.append(f"gates of {layers} set to {values.gates} only (sigma = {int(values.gates == 'position')})")
        elif values.gpsa_layers is not None:
            raise UserError("--gpsa_layers needs --gates: add --gates=position or --gates=content.")
        config = required_config()
        mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    if not several():  # see docs/clusters.md
        use_compilation_cache(config.compilation_cache)
    say(f"{describe_weights(loaded)}\nfrom {loaded.source}, computed in {loaded.settings['dtype']}")
    if changes:
        say(f"Changed for this evaluation: {'; '.join(changes)}")
    wanted = bool(predictions or values.per_class or confusion)
    result, rows = evaluate_weights(config, loaded, params, mesh, predictions=wanted)

    def name(label: int) -> str:
        return words(loaded.class_name(label))

    if values.per_class:
        say(per_class_table(rows, name))
    say("top-1 {top1:.3f}  top-5 {top5:.3f}  loss {loss:.3f}  images {images}".format(**result))
    if predictions and is_first():
        write_predictions(predictions, rows, loaded.class_name)
        print(f"Written to {predictions}", file=sys.stderr)
    if confusion and is_first():
        from convit_jax.figures.confusion import plot_confusion

        figure = plot_confusion(rows["label"], rows["predicted"], name)
        save_figure(figure, confusion.parent, confusion.stem, [confusion.suffix[1:]])
        print(f"Written to {confusion}", file=sys.stderr)


def write_predictions(path: Path, rows: Mapping[str, np.ndarray], class_name: Callable[[int], str]) -> None:
    """Writes a CSV file with a line per image: its name, its class, the predicted class and the probability of that."""
    with disk_errors(path), atomic_write(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", "label", "prediction", "probability"])
        for image, label, predicted, probability in zip(*rows.values(), strict=True):
            names = [image, class_name(label), class_name(predicted)]
            names = [name.encode(errors="backslashreplace").decode() for name in names]  # they may not be UTF-8
            writer.writerow([*names, f"{probability:.6f}"])


def per_class_table(rows: Mapping[str, np.ndarray], class_name: Callable[[int], str]) -> str:
    """Returns a table with the number of images and the top-1 of each class."""
    lines = ["images   top-1  class"]
    for label in sorted({*rows["label"].tolist()}):
        predicted = rows["predicted"][rows["label"] == label]
        lines.append(f"{len(predicted):6}  {100 * (predicted == label).mean():6.2f}  {class_name(label)}")
    return "\n".join(lines)


if __name__ == "__main__":
    launch("evaluate", main, define=_define_flags, config="", processes=True)
