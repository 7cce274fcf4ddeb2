"""How every command starts: flags in, one sentence out when something is wrong.

A command defines its own flags, may take --config with overrides of any field, and runs under
`launch`, which prints a UserError alone and ends with exit status 1.
"""

import contextlib
import gc
import json
import os
import re
import signal
import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags
from ml_collections.config_dict import placeholder

from convit_jax.errors import UserError, explained, nearest, out_of_memory

ROOT = Path(__file__).parents[1]  # where configs/ is in a clone; a package that is installed has none


def launch(
    name, main, *, define=lambda: None, config=None, arguments="", processes=False, interrupted="interrupted."
):
    """Read the command line and run a command; never returns.

    Args:
      name: of the command, at the head of its messages, as "train.py".
      main: main(arguments), the list of what is no flag; absl's flags.FLAGS are parsed. Its UserError
        is printed alone; what it returns is the exit status, None for 0.
      define: defines the command's own flags.
      config: None: no flag --config. Else the config file without one, relative to the clone, or "" for none.
      arguments: what is expected besides flags, as "SOURCE TARGET"; empty if nothing.
      processes: whether several processes may run the command as one; adds the flags that say which.
      interrupted: the end of the sentence after Ctrl-C.
    """

    def fail(sentence):
        sys.exit(f"{name}: {sentence}")

    def parse(argv):
        try:
            if processes:
                define_processes()
            return _parse(argv, define, config, arguments)
        except UserError as error:
            fail(str(error))

    def run(argv):
        import_jax()
        import jax

        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # else Orbax tells of every file it writes
        try:
            return as_one_of_several(main, argv[1:]) if processes else main(argv[1:])
        except UserError as error:
            sentence = str(error)
        except KeyboardInterrupt:
            sentence = None
        except jax.errors.JaxRuntimeError as error:
            sentence = out_of_memory(error)
            if sentence is None:
                raise
        except BrokenPipeError:  # who reads our output, as `head`, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        # Here, where the error no longer holds a loader's last batch in shared memory.
        if sentence is None:
            print(f"{name}: {interrupted}", file=sys.stderr)
            leave(130)
        fail(sentence)

    app.run(run, flags_parser=parse)


def import_jax():
    """Import JAX; Ctrl-C meanwhile ends the process at once, where its modules in C++ would crash.

    It protects commands that import JAX late, in their main, not one whose module does so at its head.
    """
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # in the background it is ignored
    if ours:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    import jax  # noqa: F401

    if ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def leave(status):
    """End the process without what Python does at its end.

    JAX compiles in a thread of its own, which goes on after Ctrl-C, and at Python's end loses the device
    under its hands: a segmentation fault.
    """
    gc.collect()  # ends a loader's processes, which Grain holds in reference cycles
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)


def define_processes():
    """Flags of commands that several processes may run as one."""
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where several processes join.")
    flags.DEFINE_integer("num_processes", None, "How many processes there are.")
    flags.DEFINE_integer("process_id", None, "Which one this is, from 0.")
    flags.DEFINE_integer("start_timeout", 300, "Seconds to wait for the other processes.")
    flags.DEFINE_integer("heartbeat_timeout", 100, "Seconds of silence after which a process counts as gone.")


def as_one_of_several(main, arguments):
    """Join the other processes, if there are any, and run main."""
    from convit_jax.training.distributed import Everywhere, ends_all, is_first, join

    values = flags.FLAGS
    join(
        values.coordinator,
        values.num_processes,
        values.process_id,
        start_timeout=values.start_timeout,
        heartbeat=values.heartbeat_timeout,
    )
    try:
        with ends_all():
            return main(arguments)
    except Everywhere:
        if is_first():
            raise
        sys.exit(1)


def config_file():
    """The path given to --config, and what follows its colon (configs/ablations.py:b), or ""."""
    path, _, row = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    return path, row


def _parse(argv, define, config, arguments):
    """Define and read the flags: argv without them. Raises UserError for what is wrong with them."""
    alone = bool(config) and not (ROOT / config).exists()
    if alone:
        config = ""
    with _flag_errors_explained(argv, config):
        if config is not None:
            # Not at import: ml_collections reads the command line as soon as the flag is defined.
            words = "Config file; --config.FIELD=VALUE changes a field of it."
            own = _own_config(argv)
            if own is None:
                path = os.path.relpath(ROOT / config) if config else None
                config_flags.DEFINE_config_file("config", path, words)
            else:
                config_flags.DEFINE_config_dict("config", own, words)
        define()
        for flag in flags.FLAGS.get_flags_for_module(__name__):
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)  # so that --help shows it
        rest = flags.FLAGS(argv)
        if config is not None and flags.FLAGS.config is not None:
            flags.FLAGS.config.lock()  # raises if the file could not be loaded
        elif alone:
            flags.FLAGS["config"].value = NoConfig()
    if len(rest) > 1 and not arguments:
        raise UserError(f"unexpected argument {rest[1]!r}: flags look like --config.epochs=10.")
    return rest


class NoConfig:
    """In place of the config that a command has by default, where the package is installed without it."""

    def __getattr__(self, field):
        raise UserError(
            "this needs a config: add --config=FILE, one of those in configs/ of the clone of the repository."
        )


def _own_config(argv):
    """The config of the run in --checkpoint, where it stands for a --config; None elsewhere."""
    values = flags.FlagValues()
    for name in ("config", "checkpoint"):
        flags.DEFINE_string(name, None, "", flag_values=values)
    values(argv, known_only=True)
    return run_config(values.checkpoint) if values.config is None and is_run(values.checkpoint) else None


def is_run(checkpoint):
    """Whether weights are given as a run directory."""
    return bool(checkpoint) and (Path(checkpoint).expanduser() / "checkpoints").is_dir()


def run_config(checkpoint):
    """The config of a run directory, but for its devices: all at hand, whatever the training had.

    Raises:
      UserError: it is no run directory, or its config.json cannot be read.
    """
    from convit_jax.rundir import default_config, flatten

    if not is_run(checkpoint):
        raise UserError(
            f"{checkpoint} is no run directory and says nothing of images: add --config=configs/convit_s.py "
            "--config.data.dir=IMAGES, or another config with a data section."
        )
    file = Path(checkpoint).expanduser() / "config.json"
    with explained(file):
        try:
            saved = flatten(json.loads(file.read_text()))
        except (ValueError, AttributeError) as error:
            raise UserError(f"it is not as train.py writes it ({error}).") from error
    config = default_config()  # knows the type of what the run left open
    with config.ignore_type():
        for name, value in {**saved, "mesh.data": -1, "mesh.fsdp": 1}.items():
            section, _, field = name.rpartition(".")
            if section and section not in config:
                config[section] = ConfigDict()
            part = config[section] if section else config
            if value is not None:
                part[field] = tuple(value) if isinstance(value, list) else value  # as the flags know it
            elif part.get(field) is not None or field not in part:
                part[field] = placeholder(object)
    return config


def load_config(arguments):
    """The config that train.py makes of ["--config=configs/digits.py", "--config.epochs=5"].

    Raises UserError for what is wrong with them, as train.py says it.
    """
    argv, values = ["train.py", *arguments], flags.FlagValues()
    with _flag_errors_explained(argv, ""):
        config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
        values(argv)
        return values.config.lock()


@contextlib.contextmanager
def _flag_errors_explained(argv, config):
    """Turns what absl and ml_collections raise of a command line into a UserError."""
    try:
        yield
    except (AttributeError, KeyError) as error:
        sentence = _unknown_field(argv) or _unknown_in_file(error)
        if sentence is None:
            raise
        raise UserError(sentence) from error
    except ModuleNotFoundError as error:
        if error.name != "configs":
            raise
        raise UserError(
            "the config file builds on others in configs/: start the command in the clone of the repository, "
            "where they are."
        ) from error
    except OSError as error:
        path = re.search(r"--?config[= ](\S+)", " ".join(argv))[1]
        files = sorted(os.path.relpath(file) for file in ROOT.glob("configs/[!_]*.py"))
        known = f"The files are: {', '.join(files)}." if files else "They are in the clone of the repository."
        raise UserError(f"there is no config file {path!r}{nearest(path, files)} {known}") from error
    except flags.Error as error:
        message = str(error).strip()
        own = re.search(r"UserError: (.*)", message)  # raised by a config file itself
        flag = re.search(r"Unknown command line flag '([\w.]+)'", message)
        if flag and flag[1].startswith("config.") and config == "":
            message = f"--{flag[1]} changes a config: add --config=FILE before it."
        elif flag and config is not None and flag[1] in _fields():
            message = f"there is no flag --{flag[1]}, did you mean --config.{flag[1]}?"
        raise UserError(own[1] if own else message) from error


def _fields():
    """Names of all config fields, as "optim.lr"; none where the package is installed without configs/."""
    from convit_jax.rundir import default_fields

    return list(default_fields())


def _unknown_field(argv):
    """The sentence for the first --config.FIELD=VALUE whose field no config has, or None."""
    known = _fields()
    fields = [arg.removeprefix("--config.").split("=")[0] for arg in argv if arg.startswith("--config.")]
    for unknown in fields:
        if known and unknown not in known:
            inside = [name for name in known if name.endswith(f".{unknown}")]
            hint = f", did you mean {inside[0]!r}?" if inside else nearest(unknown, known)
            return f"the config has no field {unknown!r}{hint} configs/default.py explains all of them."
    return None


def _unknown_in_file(error):
    """The sentence for a field that a config file sets but no config has, or None for another error."""
    key = re.search(r'Key "(\w+)" does not exist', str(error))
    near = re.search(r'Did you mean "(\w+)"', str(error))
    if key is None:
        return None
    hint = f", did you mean {near[1]!r}?" if near else "."
    return f"the config file sets {key[1]!r}, which is no field{hint} configs/default.py has them all."


def define_weights(*, checkpoint=True, new_head=False):
    """Flags of commands that load weights; with checkpoint --checkpoint, with new_head --num_classes too."""
    if checkpoint:
        flags.DEFINE_string(
            "checkpoint",
            None,
            "A .pth, .pt or .safetensors file, a converted directory, a run directory, a Hub id, or the "
            "authors' name of a published model.",
        )
    if new_head:
        flags.DEFINE_integer("num_classes", None, "Replace the head by a new one, untrained.")
        flags.DEFINE_integer("seed", 0, "Of the new head.")
    flags.DEFINE_string("image_size", None, "Resize the position embedding for such images: 384, or 224x448.")
    flags.DEFINE_integer("heads", None, "Number of heads, where no shape and no table tells it.")
    flags.DEFINE_enum("which", "best", ["best", "latest"], "Which checkpoint of a run directory.")
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of the arithmetic: float32, or a run's own.")
    flags.DEFINE_bool("ema", False, "Take the moving average of the weights in a run or a checkpoint.")


def load_weights(source=None, which=None):
    """The Pretrained that the flags of define_weights ask for; which: instead of --which."""
    from convit_jax.weights.pretrained import load, with_behaviour

    values = flags.FLAGS
    source = source or values.checkpoint
    if source is None:
        raise UserError("say with --checkpoint=PATH which weights to take; --help tells what may be given.")
    new_head = {name: values[name].value for name in ("num_classes", "seed") if name in values}
    size = re.fullmatch(r"(\d+)(?:x(\d+))?", values.image_size) if values.image_size else None
    if values.image_size and size is None:
        raise UserError(f"--image_size is {values.image_size!r}: give 384, or HEIGHTxWIDTH as 224x448.")
    size = size and (int(size[1]), int(size[2] or size[1]))
    loaded = load(
        source,
        image_size=size,
        num_heads=values.heads,
        which=values.which if which is None else which,
        ema=values.ema,
        **new_head,
    )
    return with_behaviour(loaded, dtype=values.dtype) if values.dtype else loaded
