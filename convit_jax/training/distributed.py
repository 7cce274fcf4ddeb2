"""Several processes that work as one: they join, agree, and end together.

Every process runs the same program on its own devices. A collective operation waits for all of them, so
whatever decides about one is agreed upon first, and a process that cannot go on ends at once. Process 0
prints and writes; the others print only what stops them.
"""

import contextlib
import faulthandler
import importlib.util
import json
import os
import signal
import socket
import sys
import traceback
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from convit_jax.config import flatten
from convit_jax.errors import UserError, known_cause

Result = TypeVar("Result")

# Config fields that may differ between processes. Their images and teachers are compared, the paths are not.
MAY_DIFFER = ("data.dir", "data.workers", "distill.teacher")
POD = "JOB_COMPLETION_INDEX"  # set by Kubernetes in an indexed Job


class Everywhere(UserError):
    """An error that all processes raise at the same point; process 0 prints it."""


def is_first() -> bool:
    """Returns whether this process prints and writes."""
    return jax.process_index() == 0


def several() -> bool:
    """Returns whether there are other processes."""
    return jax.process_count() > 1


def say(text: str) -> None:
    """Prints a line on process 0."""
    if is_first():
        print(text, flush=True)


def warn(text: str) -> None:
    """Prints a line to the error stream, from any process."""
    print(f"{_who()}: {text}", file=sys.stderr, flush=True)


def phase(text: str) -> None:
    """Names what begins now where processes may wait for each other: the last line explains a hang."""
    if several():
        say(f"... {text}")


def _who() -> str:
    return f"process {jax.process_index()} of {jax.process_count()}"


# ---- Joining -------------------------------------------------------------------------------


def join(
    coordinator: str | None, num_processes: int | None, process_id: int | None, start_timeout: int, heartbeat: int
) -> None:
    """Joins the other processes, if there are any, before anything else uses JAX; the arguments are flags of `cli`.

    Then SIGTERM belongs to JAX's preemption service, see `stop.Stop`, and Ctrl-C ends this process at once.
    """
    if num_processes == 1:
        return
    flags = (coordinator, num_processes, process_id)
    with_flags = flags != (None, None, None)
    if with_flags:
        _check_flags(*flags)
    number = str(process_id) if with_flags else cluster(os.environ)
    if number is None:
        if (pod := os.environ.get(POD, "0")) != "0":
            raise UserError(
                f"this is pod {pod} of a Job, and cannot join the others: pip install jax[k8s], or run it alone with "
                "--num_processes=1."
            )
        return
    if number == "0":
        print(f"... joining the other processes (at most {start_timeout} s; --num_processes=1 runs alone)", flush=True)
    jax.config.update("jax_enable_preemption_service", True)
    faulthandler.disable()  # its dump would hide the line with which JAX aborts when a process is lost
    try:
        jax.distributed.initialize(
            *flags,
            # With the flags JAX must not look at Slurm's variables: it would take one GPU per process.
            cluster_detection_method="deactivate" if with_flags else None,
            initialization_timeout=start_timeout,
            heartbeat_timeout_seconds=heartbeat,
        )
    except (ValueError, RuntimeError) as error:
        if number == "?" and isinstance(error, ValueError):  # the TPU's library is installed, but there is no TPU
            return
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"cannot join the other processes ({reason}): start all processes within {start_timeout} s, with the same "
            "coordinator and a free port, as docs/clusters.md shows, or this one alone with --num_processes=1."
        ) from error
    if several() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else a background job
        # JAX's callbacks could swallow a KeyboardInterrupt.
        text = "interrupted; the same command continues from the last checkpoint."
        signal.signal(signal.SIGINT, lambda number, frame: _end(text))


def _check_flags(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    with contextlib.suppress(ValueError, OSError):  # a wrong port; a host that nobody knows
        address = urllib.parse.urlsplit(f"//{coordinator}")
        if address.port and process_id in range(num_processes or 0):
            socket.getaddrinfo(address.hostname, address.port)
            return
    raise UserError(
        f"--coordinator is {coordinator}, --num_processes {num_processes} and --process_id {process_id}: give "
        "HOST:PORT of process 0, the number of processes and the number of this one, counted from 0; or none of "
        "the three under Slurm, Open MPI, Kubernetes or on a TPU."
    )


def cluster(environment: Mapping[str, str]) -> str | None:
    """Returns the number of this process among several that were started, "?" on a TPU, or None if it is alone."""
    # JAX finds the same and more, but also joins where a process is alone, as in an interactive job.
    if "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", 1)) > 1:
        return environment["SLURM_PROCID"]
    if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return environment["OMPI_COMM_WORLD_RANK"]
    if POD in environment and importlib.util.find_spec("kubernetes"):  # JAX asks that package for the other pods
        return environment[POD]
    return "?" if importlib.util.find_spec("libtpu") else None


# ---- Ending --------------------------------------------------------------------------------


@contextlib.contextmanager
def ends_all() -> Iterator[None]:
    """Ends one of several processes at once, with one sentence, when an error stops only this process.

    An orderly exit would wait for the others, which wait for this one and end when they miss it.
    """
    try:
        yield
    except (Everywhere, SystemExit):
        raise
    except BaseException as error:
        if not several():
            raise
        text = str(error)
        if isinstance(error, jax.errors.JaxRuntimeError) or (isinstance(error, ValueError) and "Gloo" in text):
            reason = text.partition("\n")[0]
            text = known_cause(error) or (
                f"an operation across processes failed ({reason}). If another process has ended, its output says "
                "why. Start all processes again: the same command continues from the last checkpoint."
            )
        elif not isinstance(error, UserError):
            text = "".join(traceback.format_exception(error))
        sys.stdout.flush()
        _end(text)


def _end(text: str) -> NoReturn:
    """Ends this process at once; also called in a signal handler, where Python's streams may be in use."""
    os.write(2, f"{Path(sys.argv[0]).name}: {_who()}: {text.rstrip()}\n".encode())
    os._exit(1)


# ---- Agreeing: all processes call these together --------------------------------------------


def from_all(value: Any) -> list[Any]:
    """Returns the values of all processes, which JSON can hold, in the order of the processes."""
    if not several():
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(text)))
    texts = multihost_utils.process_allgather(np.pad(text, (0, max(lengths) - len(text))))
    return [json.loads(each[:length].tobytes()) for each, length in zip(texts, lengths, strict=True)]


def from_first(work: Callable[[], Any]) -> Any:
    """Runs work() on process 0 and returns its result, which JSON can hold, on all. All raise its UserError."""
    with together():
        result = work() if is_first() else None
    return from_all(result)[0]


def from_any(text: str | None) -> str | None:
    """Returns the first text that a process has, with its number unless all have one, or None."""
    texts = from_all(text)
    for process, each in enumerate(texts):
        if each is not None:
            return f"process {process} of {len(texts)}: {each}" if None in texts else each
    return None


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Raises a UserError that one process raises inside on all processes, at the end."""
    own = None
    try:
        yield
    except UserError as error:
        if not several():
            raise
        own = str(error)
    if text := from_any(own):
        raise Everywhere(text)


def first_then_others(work: Callable[[], Result]) -> Result:
    """Returns work(), run on process 0 before the others, which then find what it has left on the disk."""
    for turn in (True, False):
        with together():
            if is_first() is turn:
                result = work()
    return result


def check_same(facts: Mapping[str, Any], remedy: str = "start all processes with the same command") -> None:
    """Raises Everywhere if the processes have different facts, {name: value that JSON can hold}."""
    first, *others = from_all(dict(facts))
    for process, theirs in enumerate(others, start=1):
        for name in first:
            if theirs.get(name) != first[name]:
                values = f"{theirs.get(name)!r} here and {first[name]!r} on process 0"
                raise Everywhere(f"process {process} of {len(others) + 1}: {name} is {values}: {remedy}.")


def comparable(config: ConfigDict) -> dict[str, Any]:
    """Returns the fields of a config that all processes must share, by name."""
    return {name: value for name, value in flatten(config).items() if name not in MAY_DIFFER}
