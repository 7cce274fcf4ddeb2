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

HERE = Path(__file__).parent


def parse(argv):
    """Define and read the flags; what is wrong with them is said in one sentence."""
    try:
        # Here and not above: ml_collections reads the command line as soon as the flag is defined.
        config_flags.DEFINE_config_file(
            "config",
            os.path.relpath(HERE / "configs/digits.py"),
            "Config file; --config.FIELD=VALUE changes a field of it.",
        )
        flags.DEFINE_string("workdir", None, "Run directory; by default runs/NAME of the config file.")
        rest = flags.FLAGS(argv)
        flags.FLAGS.config.lock()  # raises if the file could not be loaded
    except (AttributeError, KeyError) as error:
        sentence = unknown_field(argv) or unknown_in_file(error)
        if sentence is None:
            raise
        fail(sentence)
    except OSError:
        path = re.search(r"--?config[= ](\S+)", " ".join(argv))[1]
        files = sorted(os.path.relpath(file) for file in HERE.glob("configs/[!_]*.py"))
        fail(f"there is no config file {path!r}{nearest(path, files)} The files are: {', '.join(files)}.")
    except flags.Error as error:
        message = str(error).strip()
        own = re.search(r"UserError: (.*)", message)  # raised by a config file itself
        flag = re.search(r"Unknown command line flag '([\w.]+)'", message)
        if flag and flag[1] in flatten(default.get_config()):
            message = f"there is no flag --{flag[1]}, did you mean --config.{flag[1]}?"
        fail(own[1] if own else message)
    if len(rest) > 1:
        fail(f"unexpected argument {rest[1]!r}: flags look like --config.epochs=10.")
    return rest


def unknown_field(argv):
    """The sentence for the first --config.FIELD=VALUE whose field no config has, or None."""
    known = list(flatten(default.get_config()))
    fields = [arg.removeprefix("--config.").split("=")[0] for arg in argv if arg.startswith("--config.")]
    for unknown in fields:
        if unknown not in known:
            inside = [name for name in known if name.endswith(f".{unknown}")]
            hint = f", did you mean {inside[0]!r}?" if inside else nearest(unknown, known)
            return f"the config has no field {unknown!r}{hint} configs/default.py explains all of them."
    return None


def unknown_in_file(error):
    """The sentence for a field that a config file sets but no config has, or None for another error."""
    key = re.search(r'Key "(\w+)" does not exist', str(error))
    near = re.search(r'Did you mean "(\w+)"', str(error))
    if key is None:
        return None
    hint = f", did you mean {near[1]!r}?" if near else "."
    return f"the config file sets {key[1]!r}, which is no field{hint} configs/default.py has them all."


def main(_):
    """Train what the flags say."""
    from convit_jax.training.loop import train

    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # else Orbax tells of every file it writes
    path, _, row = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    workdir = flags.FLAGS.workdir or f"runs/{'_'.join(filter(None, (Path(path).stem, row)))}"
    try:
        train(flags.FLAGS.config, workdir)
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt:  # before the loop takes signals over, or the second one
        print("train.py: interrupted; what was saved stays, the same command continues.", file=sys.stderr)
        sys.exit(130)


def fail(sentence):
    """End with a sentence for the user."""
    sys.exit(f"train.py: {sentence}")


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
