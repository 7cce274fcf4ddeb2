"""Per-class subsets of a data set, for the sample-efficiency experiments (ConViT, Table 2).

Rule "first" is the authors' (their datasets.py): the first int(n * f) images of each class in sorted order of
their names. Rule "random" sorts by a hash of (seed, name) instead: subsets of one seed are nested and do not
depend on other classes or on the machine.
"""

import hashlib
import math
import os
from typing import Any

import numpy as np

from convit_jax.data.index import Source
from convit_jax.errors import UserError


def select(
    source: Source, *, num_classes: int | None = None, sampling_ratio: float = 1.0, rule: str = "first", seed: int = 0
) -> np.ndarray:
    """Returns the indices of a subset of a source, int64, ascending; settings as data.* in configs/default.py.

    Raises UserError if the source has fewer classes, or a class is left without an image.
    """
    present = len(source.class_names)
    if num_classes is not None and not 1 <= num_classes <= present:
        raise UserError(f"data.num_classes is {num_classes}, but the data has {present} classes.")

    borders = np.searchsorted(source.labels, np.arange(present + 1))
    chosen = []
    for label in range(num_classes or present):
        members = np.arange(borders[label], borders[label + 1])  # in the order of their names
        keep = int(len(members) * sampling_ratio)  # truncated, as the authors do
        if len(members) and keep == 0:
            raise UserError(
                f"data.sampling_ratio {sampling_ratio} leaves no image of class {label}, which has "
                f"{len(members)}: give at least {math.ceil(1e4 / len(members)) / 1e4}."
            )
        if rule == "random" and keep < len(members):
            hashes = [hashlib.sha256(os.fsencode(f"{seed}/{source.name(index)}")).digest() for index in members]
            members = members[np.argsort(hashes)]
        chosen.append(members[:keep])
    return np.sort(np.concatenate(chosen))


def training_subset(config: Any, source: Source) -> np.ndarray:
    """Returns the indices of the images of a training source that a config trains on, int64, ascending."""
    data = config.data
    return select(
        source,
        num_classes=data.num_classes,
        sampling_ratio=data.sampling_ratio,
        rule=data.subset_rule,
        seed=config.seed,
    )


def evaluated_subset(config: Any, source: Source) -> np.ndarray:
    """Returns the indices of the images of a test source that a config evaluates, int64, ascending, at least one."""
    indices = select(source, num_classes=config.data.num_classes)
    if not len(indices):
        classes = config.data.num_classes or len(source.class_names)
        raise UserError(f"none of the {classes} classes has a test image: add some.")
    return indices
