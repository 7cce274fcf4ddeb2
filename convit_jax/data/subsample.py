"""Per-class subsets of a data set, for the sample-efficiency experiments (ConViT, Table 2).

Rule "first" is the authors' (their datasets.py): the first int(n * f) images of each class in sorted order of
their names. Rule "random" sorts by a hash of (seed, name) instead: subsets of one seed are nested and do not
depend on other classes or on the machine.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from convit_jax.data.index import Names
from convit_jax.data.sources import Source
from convit_jax.errors import UserError


def select(
    labels: np.ndarray,
    names: Names | Sequence[str],
    *,
    classes: int | None = None,
    sampling_ratio: float = 1.0,
    num_classes: int | None = None,
    rule: str = "first",
    seed: int = 0,
) -> np.ndarray:
    """Returns the indices of a subset, int64, ascending.

    Args:
      labels: class of each image, int [n].
      names: name of each image, unique within a class.
      classes: number of classes in the data; None: the largest label + 1.
      sampling_ratio, num_classes, rule: as data.* in configs/default.py.
      seed: of the random rule.

    Raises:
      UserError: the data has fewer classes, or a class is left without an image.
    """
    present = int(labels.max()) + 1 if classes is None else classes
    if num_classes is not None and not 1 <= num_classes <= present:
        raise UserError(f"data.num_classes is {num_classes}, but the data has {present} classes.")

    def order(index: int) -> str | bytes:
        if rule == "first":
            return names[index]
        return hashlib.sha256(f"{seed}/{names[index]}".encode()).digest()

    by_class = np.argsort(labels, kind="stable")
    borders = np.searchsorted(labels[by_class], np.arange(present + 1))
    chosen = []
    for label in range(present if num_classes is None else num_classes):
        members = by_class[borders[label] : borders[label + 1]]
        keep = int(len(members) * sampling_ratio)  # truncated, as the authors do
        if len(members) and keep == 0:
            enough = math.ceil(1e4 / len(members)) / 1e4
            raise UserError(
                f"data.sampling_ratio {sampling_ratio} leaves no image of class {label}, which has "
                f"{len(members)}: give at least {enough}."
            )
        if keep < len(members):
            members = np.array(sorted(members.tolist(), key=order)[:keep], np.int64)
        chosen.append(members)
    return np.sort(np.concatenate(chosen))


def training_subset(config: Any, source: Source) -> np.ndarray:
    """Returns the indices of the images of a training source that a config trains on, int64, ascending."""
    return select(
        source.labels,
        source.names,
        classes=len(source.class_names),
        sampling_ratio=config.data.sampling_ratio,
        num_classes=config.data.num_classes,
        rule=config.data.subset_rule,
        seed=config.seed,
    )
