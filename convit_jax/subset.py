"""Lists the images that a config trains on, with a hash to quote in a paper.

    python -m convit_jax.subset --config=configs/convit_s.py --config.data.sampling_ratio=0.1 --list

The last line has the number of images and the SHA-256 of the lines with their names.
"""

import hashlib
import os

import numpy as np
from absl import flags

from convit_jax.cli import launch, required_config
from convit_jax.data.sources import open_source
from convit_jax.data.subsample import training_subset


def _define_flags() -> None:
    flags.DEFINE_bool("list", False, "Print the name of every image.")


def main(arguments: list[str]) -> None:
    """Prints the number of images and their hash; with --list their names first."""
    config = required_config()
    source = open_source(config.data, "train")
    indices = training_subset(config, source)
    lines = "".join(f"{source.name(index)}\n" for index in indices)
    if flags.FLAGS.list:
        print(lines, end="")
    digest = hashlib.sha256(os.fsencode(lines)).hexdigest()
    classes = len(np.unique(source.labels[indices]))
    print(
        f"# {len(indices):,} of {len(source.labels):,} images in {classes} classes of {config.data.name}, "
        f"ratio {config.data.sampling_ratio:g}, rule {config.data.subset_rule}, sha256 {digest}"
    )


if __name__ == "__main__":
    launch("subset", main, define=_define_flags, config="")
