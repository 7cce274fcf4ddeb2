"""How every command starts: read the flags, run, print one sentence if something is wrong.

A command defines its own flags, may take --config with overrides of any field, and runs under `launch`, which
prints a UserError alone and exits with status 1.
"""

import contextlib
import faulthandler
import io
import os
import runpy
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict

from convit_jax.config import ROOT, check_config, declared_fields, is_run, take_config, take_option
from convit_jax.errors import UserError, known_cause

if TYPE_CHECKING:
    from convit_jax.weights.formats import Pretrained


def launch(
    name: str,
    main: Callable[[list[str]], int | None],
    *,
    define: Callable[[], None] = lambda: None,
    config: str | None = None,
    arguments: str = "",
    processes: bool = False,
    interrupted: str = "interrupted.",
) -> NoReturn:
    """Reads the command line and runs a command; never returns.

    `name` begins each message. `main` gets the arguments that are not flags; it returns the exit status or None.
    `define` defines the command's own flags. `config` is the default of --config, as configs/digits.py; "": there
    is no default; None: the command takes no config. `arguments` names what is expected besides flags.
    `processes`: several processes can run the command together. `interrupted` is printed after Ctrl-C.
    """
    with contextlib.suppress(RuntimeError, OSError):  # where the error stream is closed
        faulthandler.enable()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name may be of another encoding
    sys.unraisablehook = _repeat_interrupt
    logging.use_absl_handler()
    app.define_help_flags()
    message = None
    try:
        rest = _parse(sys.argv, [_define_processes, define] if processes else [define], config, arguments)[1:]
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C would crash C++ modules during the import
        import jax  # noqa: F401

        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        sys.exit(_run_with_others(main, rest) if processes else main(rest))
    except UserError as error:
        message = str(error)
    except KeyboardInterrupt:
        pass
    except ImportError as error:
        if not isinstance(error.__cause__, KeyboardInterrupt):  # in the import of a C++ module
            raise
    except BrokenPipeError:  # the reader of our output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (RuntimeError, AssertionError) as error:  # of JAX, or of pathlib
        message = known_cause(error)
        if message is None:
            raise
    if message is not None:
        sys.exit(f"{name}: {message}")
    print(f"{name}: {interrupted}", file=sys.stderr)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    if loader := sys.modules.get("convit_jax.data.loader"):
        loader.free_shared_memory()  # outside of `except`, where the error no longer holds a batch
    os._exit(130)  # JAX may still compile in a thread, which crashes when Python's shutdown removes the device


def _repeat_interrupt(unraisable: Any) -> None:
    """Repeats Ctrl-C where Python drops it: in a callback, such as JAX's at garbage collection."""
    if unraisable.exc_type is KeyboardInterrupt:
        main_thread = threading.main_thread().ident
        threading.Timer(0.1, signal.pthread_kill, [main_thread, signal.SIGINT]).start()
    else:
        sys.__unraisablehook__(unraisable)


def console() -> None:
    """Runs the command that a console script is named after: convit-train, convit-evaluate, ..."""
    name = Path(sys.argv[0]).stem.removeprefix("convit-")
    if name == "train":
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    else:
        runpy.run_module(f"convit_jax.{name}", run_name="__main__", alter_sys=True)


# ---- Several processes -----------------------------------------------------------------------


def _define_processes() -> None:
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0.")
    flags.DEFINE_integer("num_processes", None, "Number of processes.")
    flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
    flags.DEFINE_integer("start_timeout", 300, "Seconds to wait for the other processes.", lower_bound=1)
    flags.DEFINE_integer("heartbeat_timeout", 100, "Seconds after which a silent process is lost.", lower_bound=1)


def _run_with_others(main: Callable[[list[str]], int | None], arguments: list[str]) -> int | None:
    """Joins the other processes, if there are any, and runs main."""
    from convit_jax.training.distributed import Everywhere, ends_all, is_first, join

    values = flags.FLAGS
    where = values.coordinator, values.num_processes, values.process_id
    join(*where, start_timeout=values.start_timeout, heartbeat=values.heartbeat_timeout)
    try:
        with ends_all():
            return main(arguments)
    except Everywhere:
        if is_first():
            raise
        sys.exit(1)


# ---- Configs ---------------------------------------------------------------------------------


_defined: set[str] = set()  # the flags of the command that ran last in this process, as in a notebook


def _parse(argv: list[str], define: Sequence[Callable[[], None]], config: str | None, arguments: str) -> list[str]:
    """Defines and reads the flags; returns argv without them. Raises UserError for wrong flags; --help exits."""
    while _defined:
        delattr(flags.FLAGS, _defined.pop())
    others = {*flags.FLAGS}
    try:
        if config is not None:
            argv = _define_config(argv, config)
        for define_some in define:
            define_some()
        for flag in flags.FLAGS.get_flags_for_module(__name__):
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)  # shows it in --help
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        raise UserError(_explain(error, config)) from error
    except SystemExit:  # after --help, with absl's status 1
        sys.exit(0)
    finally:
        _defined.update({*flags.FLAGS} - others)
    if len(rest) - 1 != len(arguments.split()) and not arguments.endswith("..."):
        expected = arguments or "only flags, such as --config.epochs=10"
        raise UserError(f"expected {expected}, got {' '.join(rest[1:]) or 'nothing'}: see --help.")
    return rest


def _define_config(argv: list[str], default: str) -> list[str]:
    """Defines --config, whose value becomes the ConfigDict with all changes; returns argv without these flags.

    The config is that of --config, or of the run directory in --checkpoint, or the default.
    """
    given, checkpoint = (take_option(argv, name)[0] for name in ("config", "checkpoint"))
    if is_run(checkpoint):
        default = str(checkpoint)
    flags.DEFINE_string("config", None, "Config file, or run directory; --config.FIELD=VALUE changes a field.")
    flags.FLAGS["config"].value, rest = take_config(argv, default or None)
    flags.FLAGS["config"].present = int(given is not None)
    return rest


def _explain(error: flags.Error, config: str | None) -> str:
    """Returns the message for a flag error; better than absl's for flags that mean a config field."""
    name = error.flagname if isinstance(error, flags.UnrecognizedFlagError) else ""
    if name.startswith("config."):
        return f"--{name} changes a config: add --config=FILE, for a folder of images configs/finetune.py."
    if config is not None and name in declared_fields():
        return f"there is no flag --{name}, did you mean --config.{name}?"
    return str(error).strip()


def source_name(source: str) -> str:
    """Returns the name of FILE.py or FILE.py:NAME for a directory: "convit_s", or "ablations_b" for ablations.py:b."""
    path, _, name = source.partition(":")
    return "_".join(filter(None, (Path(path).stem, name)))


def required_config() -> ConfigDict:
    """Returns the config of the command line, checked. Raises UserError if there is none or a value is wrong."""
    if flags.FLAGS.config is None:
        raise UserError(
            "this needs a config: add --config=configs/convit_s.py --config.data.dir=IMAGENET, or for a folder of "
            "images --config=configs/finetune.py --config.data.dir=FOLDER."
        )
    check_config(flags.FLAGS.config)
    return flags.FLAGS.config


# ---- Weights ---------------------------------------------------------------------------------


def define_weights(*, checkpoint: bool = True) -> None:
    """Defines the flags of commands that load weights, with or without --checkpoint."""
    if checkpoint:
        words = "A .pth, .pt or .safetensors file, a converted or run directory, a Hub id, or a published model's name."
        flags.DEFINE_string("checkpoint", None, words)
    flags.DEFINE_string("image_size", None, "Resize the position embedding: SIDE or HEIGHTxWIDTH, as 384 or 224x448.")
    flags.DEFINE_integer("heads", None, "Number of attention heads; needed only if the file does not determine it.")
    flags.DEFINE_enum("which", "best", ["best", "latest"], "Which checkpoint of a run directory.")
    flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "dtype of the computation.")
    flags.DEFINE_bool("ema", False, "Use the moving average of the weights.")


def load_weights(source: str | None = None, *, needs_head: bool = False, **options: Any) -> "Pretrained":
    """Returns the weights of `source`, or of --checkpoint, as the flags and more options of `load` describe."""
    from convit_jax.weights.pretrained import load, with_behaviour

    values = flags.FLAGS
    source = source or values.checkpoint
    if source is None:
        raise UserError("there are no weights: add --checkpoint=PATH; --help lists what PATH can be.")
    options = {"which": values.which, **options}
    loaded = load(source, image_size=values.image_size, num_heads=values.heads, ema=values.ema, **options)
    if needs_head and not loaded.settings["num_classes"]:
        raise UserError(f"{source} has no head: train one with config.init_from, or give weights with a head.")
    if needs_head and (channels := loaded.settings["in_chans"]) != 3:
        raise UserError(f"{source} is for images of {channels} channels: give weights for RGB images.")
    return with_behaviour(loaded, dtype=values.dtype) if values.dtype else loaded
