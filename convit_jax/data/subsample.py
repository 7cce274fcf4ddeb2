"""Per-class subsets of a data set, for the sample-efficiency experiments (ConViT, Table 2).

Rule "first" is the original's (its datasets.py): of each class the first int(n * f) images in
sorted order of their names. Rule "random" orders a class by a hash of (seed, name) instead:
subsets of one seed are nested, and do not depend on other classes or on the machine.

    python -m convit_jax.data.subsample --config=configs/convit_s.py --config.data.sampling_ratio=0.1 [--list]
"""

import hashlib
import math
import sys

import numpy as np
from absl import flags

from convit_jax.cli import launch
from convit_jax.data.sources import open_source
from convit_jax.errors import UserError

RULES = ("first", "random")


def select(labels, names, *, classes=None, sampling_ratio=1.0, num_classes=None, rule="first", seed=0):
    """Indices of the subset, int64, ascending.

    Args:
      labels: int [n]. names: n strings, unique within a class. classes: how many there are; None: as
        many as the labels show.
      sampling_ratio: fraction f of each class, 0 < f <= 1.
      num_classes: keep the classes 0 .. num_classes - 1 only; None keeps all.
      rule: "first" or "random". seed: of the random rule.

    Raises:
      UserError: a ratio or number of classes out of range, or a class left without an image.
    """
    present = int(labels.max()) + 1 if classes is None else classes
    if not 0.0 < sampling_ratio <= 1.0:
        raise UserError(f"data.sampling_ratio is {sampling_ratio}: it is a fraction, above 0 and at most 1.")
    if num_classes is not None and not 1 <= num_classes <= present:
        raise UserError(f"data.num_classes is {num_classes}, but the data has {present} classes.")
    if rule not in RULES:
        raise UserError(f"data.subset_rule is {rule!r}: choose {' or '.join(RULES)}.")

    def order(index):
        if rule == "first":
            return names[index]
        return hashlib.sha256(f"{seed}/{names[index]}".encode()).digest()

    by_class = np.argsort(labels, kind="stable")
    borders = np.searchsorted(labels[by_class], np.arange(present + 1))
    chosen = []
    for label in range(present if num_classes is None else num_classes):
        members = by_class[borders[label] : borders[label + 1]]
        keep = int(len(members) * sampling_ratio)  # truncated, as the original does
        if len(members) and keep == 0:
            enough = math.ceil(1e4 / len(members)) / 1e4  # rounded up
            raise UserError(
                f"data.sampling_ratio {sampling_ratio} leaves no image of class {label}, which has "
                f"{len(members)}: give at least {enough}."
            )
        if keep < len(members):
            members = np.array(sorted(members.tolist(), key=order)[:keep], np.int64)
        chosen.append(members)
    return np.sort(np.concatenate(chosen))


def training_subset(config, source):
    """Indices of the images of a training source that a config trains on, int64, ascending."""
    return select(
        source.labels,
        source.names,
        classes=len(source.class_names),
        sampling_ratio=config.data.sampling_ratio,
        num_classes=config.data.num_classes,
        rule=config.data.subset_rule,
        seed=config.seed,
    )


def main(_):
    """Print which images a config trains on: their number and a hash; with --list, their names before it."""
    config = flags.FLAGS.config
    if config is None:
        raise UserError("say of which training: add --config=configs/convit_s.py.")
    source = open_source(config.data, "train")
    digest = hashlib.sha256()
    indices = training_subset(config, source)
    for index in indices:
        line = f"{source.names[index]}\n"
        digest.update(line.encode())
        if flags.FLAGS.list:
            sys.stdout.write(line)
    classes = len(np.unique(source.labels[indices]))
    print(
        f"# {len(indices):,} of {len(source):,} images in {classes} classes of {config.data.name}, "
        f"ratio {config.data.sampling_ratio:g}, rule {config.data.subset_rule}, sha256 {digest.hexdigest()}"
    )


if __name__ == "__main__":
    launch(
        "subsample",
        main,
        define=lambda: flags.DEFINE_bool("list", False, "Print the name of every image of the subset."),
        config="",
    )
