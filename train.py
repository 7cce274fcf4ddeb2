"""Train a ConViT or DeiT: python train.py --config=configs/convit_s.py --workdir=runs/mine."""

import os
import re
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from configs import default
from convit_jax.errors import UserError, nearest
from convit_jax.training.rundir import flatten


def parse(argv):
    """Define and read the flags; what is wrong with them is said in one sentence."""
    try:
        # Here and not above: ml_collections reads the command line as soon as the flag is defined.
        config_flags.DEFINE_config_file(
            "config", "configs/digits.py", "Config file; --config.FIELD=VALUE changes a field of it."
        )
        flags.DEFINE_string("workdir", None, "Run directory; by default runs/NAME of the config file.")
        rest = flags.FLAGS(argv)
        flags.FLAGS.config.lock()  # raises if the file could not be loaded
    except (AttributeError, KeyError):
        fail(unknown_field(argv))
    except OSError:
        path = next(arg.split("=", 1)[1] for arg in argv if arg.startswith("--config="))
        files = sorted(str(file) for file in Path("configs").glob("[!_]*.py"))
        fail(f"there is no config file {path!r}{nearest(path, files)} configs/ has: {', '.join(files)}.")
    except flags.Error as error:
        message = str(error).strip()
        own = re.search(r"UserError: (.*)", message)  # raised by a config file itself
        fail(own[1] if own else message)
    if len(rest) > 1:
        fail(f"unexpected argument {rest[1]!r}: flags look like --config.epochs=10.")
    return rest


def unknown_field(argv):
    """The sentence for the first --config.FIELD=VALUE whose field no config has."""
    known = list(flatten(default.get_config()))
    fields = [arg.removeprefix("--config.").split("=")[0] for arg in argv if arg.startswith("--config.")]
    unknown = next(field for field in fields if field not in known)
    inside = [name for name in known if name.endswith(f".{unknown}")]
    hint = f", did you mean {inside[0]!r}?" if inside else nearest(unknown, known)
    return f"the config has no field {unknown!r}{hint} configs/default.py explains all of them."


def main(_):
    """Train what the flags say."""
    from convit_jax.training.checkpoint import FULL
    from convit_jax.training.loop import train

    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # else Orbax tells of every file it writes
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]).stem
    workdir = flags.FLAGS.workdir or f"runs/{name}"
    try:
        train(flags.FLAGS.config, workdir)
    except UserError as error:
        fail(str(error))
    except OSError as error:
        if error.errno not in FULL:
            raise
        print(
            f"train.py: the disk of {workdir} is full: make room and start the same command again, "
            "it continues at the last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)  # without the exit hooks of TensorBoard's writer, which would try to write once more


def fail(sentence):
    """End with a sentence for the user."""
    sys.exit(f"train.py: {sentence}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
