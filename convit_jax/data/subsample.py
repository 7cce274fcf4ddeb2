"""Per-class subsets of a data set, for the sample-efficiency experiments (ConViT, Table 2).

Rule "first" is the original's (its datasets.py): of each class the first int(n * f) images in
sorted order of their names. Rule "random" orders a class by a hash of (seed, name) instead:
subsets of one seed are nested, and do not depend on other classes or on the machine.
"""

import hashlib
import math
from collections import defaultdict

import numpy as np

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
    members = defaultdict(list)
    for index, label in enumerate(labels.tolist()):
        members[label].append(index)

    def order(index):
        if rule == "first":
            return names[index]
        return hashlib.sha256(f"{seed}/{names[index]}".encode()).digest()

    chosen = []
    for label in range(present if num_classes is None else num_classes):
        keep = int(len(members[label]) * sampling_ratio)  # truncated, as the original does
        if members[label] and keep == 0:
            enough = math.ceil(1e4 / len(members[label])) / 1e4  # rounded up
            raise UserError(
                f"data.sampling_ratio {sampling_ratio} leaves no image of class {label}, which has "
                f"{len(members[label])}: give at least {enough}."
            )
        chosen += sorted(members[label], key=order)[:keep]
    return np.array(sorted(chosen), np.int64)
