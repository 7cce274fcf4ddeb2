"""Train a ConViT or DeiT: python train.py --config=configs/convit_s.py --workdir=runs/mine."""

import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from convit_jax.errors import UserError

CONFIG = config_flags.DEFINE_config_file(
    "config", "configs/digits.py", "Config file; --config.FIELD=VALUE changes it."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Run directory; by default runs/NAME of the config file.")


def main(argv):
    from convit_jax.training.loop import train

    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # else Orbax tells of every file it writes

    name = Path(config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]).stem
    try:
        train(CONFIG.value, WORKDIR.value or f"runs/{name}")
    except UserError as error:
        sys.exit(f"train.py: {error}")


if __name__ == "__main__":
    app.run(main)
