"""How every command starts: read the flags, run, print one sentence if something is wrong.

A command defines its own flags, may take --config with overrides of any field, and runs under `launch`, which
prints a UserError alone and exits with status 1.
"""

import contextlib
import gc
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from convit_jax.config import (
    ROOT,
    check_overrides,
    default_config,
    find_option,
    flatten,
    load_config_file,
    load_run_config,
    without_option,
)
from convit_jax.errors import UserError, out_of_memory
from convit_jax.rundir import is_run

if TYPE_CHECKING:
    from convit_jax.weights.formats import Pretrained

Main = Callable[[list[str]], int | None]


def launch(
    name: str,
    main: Main,
    *,
    define: Callable[[], None] = lambda: None,
    config: str | None = None,
    arguments: str = "",
    processes: bool = False,
    interrupted: str = "interrupted.",
) -> NoReturn:
    """Reads the command line and runs a command; never returns.

    Args:
      name: Command name, printed before its messages, for example "train.py".
      main: gets the arguments that are not flags, with absl's flags parsed; returns the exit status or None.
      define: defines the command's own flags.
      config: None: the command takes no --config. Otherwise its default config file, relative to the clone,
        or "" for none.
      arguments: Expected arguments besides flags, such as "SOURCE TARGET".
      processes: whether several processes can run the command together; adds the flags for this.
      interrupted: end of the message after Ctrl-C.
    """

    def fail(message: str) -> NoReturn:
        sys.exit(f"{name}: {message}")

    def parse(argv: list[str]) -> list[str]:
        try:
            if processes:
                _define_processes()
            return _parse(argv, define, config, arguments)
        except UserError as error:
            fail(str(error))

    def run(argv: list[str]) -> int | None:
        import_jax()
        import jax

        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # Orbax reports every file at INFO
        try:
            return _run_with_others(main, argv[1:]) if processes else main(argv[1:])
        except UserError as error:
            message: str | None = str(error)
        except KeyboardInterrupt:
            message = None
        except jax.errors.JaxRuntimeError as error:
            message = out_of_memory(error)
            if message is None:
                raise
        except BrokenPipeError:  # the reader of our output, such as `head`, has closed it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        # Outside of `except`, where the error no longer holds a loader's batch in shared memory.
        if message is None:
            print(f"{name}: {interrupted}", file=sys.stderr)
            leave(130)
        fail(message)

    app.run(run, flags_parser=parse)
    raise AssertionError("app.run never returns")


def import_jax() -> None:
    """Imports JAX; Ctrl-C during the import ends the process at once instead of crashing C++ modules."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # ignored in background jobs
    if ours:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    import jax  # noqa: F401

    if ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def leave(status: int) -> NoReturn:
    """Ends the process without Python's shutdown.

    JAX's compiler thread goes on after Ctrl-C and crashes when Python's shutdown removes the device.
    """
    gc.collect()  # ends loader processes, which Grain keeps in reference cycles
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)


# ---- Several processes -----------------------------------------------------------------------


def _define_processes() -> None:
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0.")
    flags.DEFINE_integer("num_processes", None, "Number of processes.")
    flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
    flags.DEFINE_integer("start_timeout", 300, "Seconds to wait for the other processes.", lower_bound=1)
    silence = "Seconds of silence after which a process counts as lost."
    flags.DEFINE_integer("heartbeat_timeout", 100, silence, lower_bound=1)


def _run_with_others(main: Main, arguments: list[str]) -> int | None:
    """Joins the other processes, if there are any, and runs main."""
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


# ---- Configs ---------------------------------------------------------------------------------


def _parse(argv: list[str], define: Callable[[], None], config: str | None, arguments: str) -> list[str]:
    """Defines and reads the flags; returns argv without them. Raises UserError for wrong flags."""
    try:
        if config is not None:
            argv = _define_config(argv, config)
        define()
        for flag in flags.FLAGS.get_flags_for_module(__name__):
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)  # shows it in --help
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        raise UserError(_explain(error, config)) from error
    if len(rest) > 1 and not arguments:
        raise UserError(f"unexpected argument {rest[1]!r}: flags look like --config.epochs=10.")
    return rest


def _define_config(argv: list[str], default: str) -> list[str]:
    """Defines --config and --config.FIELD; returns argv without --config.

    The config is that of --config, or of the run directory in --checkpoint, or the default.
    """
    words = "Config file; --config.FIELD=VALUE changes a field."
    given, checkpoint = find_option(argv[1:], "config"), find_option(argv[1:], "checkpoint")
    check_overrides(argv)
    if given is not None:
        config = load_config_file(given)
    elif is_run(checkpoint):
        config = load_run_config(Path(str(checkpoint)).expanduser())
    elif default and (ROOT / default).exists():
        config = load_config_file(default)
    else:
        flags.DEFINE_string("config", None, words)
        return argv
    argv = without_option(argv, "config")
    config_flags.DEFINE_config_dict("config", config, words, sys_argv=argv)
    flags.FLAGS["config"].present = int(given is not None)
    return argv


def _explain(error: flags.Error, config: str | None) -> str:
    """Returns the message for a flag error; better than absl's for flags that mean a config field."""
    name = error.flagname if isinstance(error, flags.UnrecognizedFlagError) else ""
    if name.startswith("config."):
        return f"--{name} changes a config: add --config=FILE."
    if config is not None and name in flatten(default_config()):
        return f"there is no flag --{name}, did you mean --config.{name}?"
    return str(error).strip()


def config_name(default: str) -> str:
    """Returns a name for the config on the command line: "convit_s", or "ablations_b" for ablations.py:b."""
    path, _, row = (find_option(sys.argv[1:], "config") or default).partition(":")
    return "_".join(filter(None, (Path(path).stem, row)))


def required_config() -> ConfigDict:
    """Returns the config of the command line. Raises UserError if there is none."""
    if flags.FLAGS.config is None:
        raise UserError("this needs a config: add --config=FILE, one of configs/ in the repository.")
    return flags.FLAGS.config


# ---- Weights ---------------------------------------------------------------------------------


def define_weights(*, checkpoint: bool = True, new_head: bool = False) -> None:
    """Defines the flags of commands that load weights: --checkpoint, and --num_classes for a new head."""
    if checkpoint:
        flags.DEFINE_string(
            "checkpoint",
            None,
            "A .pth, .pt or .safetensors file, a converted directory, a run directory, a Hub id, or the name "
            "of a published model.",
        )
    if new_head:
        flags.DEFINE_integer("num_classes", None, "Replace the head by a new one with this many classes.")
        flags.DEFINE_integer("seed", 0, "Seed of the new head.")
    flags.DEFINE_string(
        "image_size", None, "Image size for the position embedding: SIDE or HEIGHTxWIDTH, such as 384 or 224x448."
    )
    flags.DEFINE_integer("heads", None, "Number of attention heads; needed only if the file does not determine it.")
    flags.DEFINE_enum("which", "best", ["best", "latest"], "Which checkpoint of a run directory.")
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "dtype of the computation.")
    flags.DEFINE_bool("ema", False, "Use the moving average of the weights.")


def load_weights(source: str | None = None, which: str | int | None = None) -> "Pretrained":
    """Returns the weights that the flags of `define_weights` describe.

    Args:
      source: instead of --checkpoint.
      which: instead of --which.
    """
    from convit_jax.weights.pretrained import load, with_behaviour

    values = flags.FLAGS
    source = source or values.checkpoint
    if source is None:
        raise UserError("there are no weights: add --checkpoint=PATH; --help lists what PATH can be.")
    names = [name for name in ("num_classes", "seed") if name in values]
    new_head: dict[str, Any] = {name: values[name].value for name in names}
    loaded = load(
        source,
        image_size=_image_size(values.image_size),
        num_heads=values.heads,
        which=values.which if which is None else which,
        ema=values.ema,
        **new_head,
    )
    return with_behaviour(loaded, dtype=values.dtype) if values.dtype else loaded


def _image_size(text: str | None) -> tuple[int, int] | None:
    """Returns (height, width) of "384" or "224x448"."""
    if text is None:
        return None
    sides: Sequence[str] = text.split("x")
    if len(sides) > 2 or not all(side.isdigit() for side in sides):
        raise UserError(f"--image_size is {text!r}: give 384, or HEIGHTxWIDTH such as 224x448.")
    return int(sides[0]), int(sides[-1])
