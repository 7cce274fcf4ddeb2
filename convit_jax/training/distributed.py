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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from convit_jax.config import flatten
from convit_jax.errors import UserError, out_of_memory
from convit_jax.rundir import is_run

Result = TypeVar("Result")

# Config fields that may differ between processes. Their images and teachers are compared, the paths are not.
MAY_DIFFER = ("data.dir", "data.workers", "distill.teacher")
MESSAGE_BYTES = 1000  # of an error, told to the other processes


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
    print(f"process {jax.process_index()} of {jax.process_count()}: {text}", file=sys.stderr, flush=True)


def phase(text: str) -> None:
    """Names what begins now where processes may wait for each other: the last line explains a hang."""
    if several():
        say(f"... {text}")


# ---- Joining -------------------------------------------------------------------------------


def join(
    coordinator: str | None, num_processes: int | None, process_id: int | None, start_timeout: int, heartbeat: int
) -> None:
    """Joins the other processes, if there are any, before anything else uses JAX.

    The arguments are the flags of `cli`. Then SIGTERM belongs to JAX's preemption service, see `stop.Stop`, and
    Ctrl-C ends this process at once. Raises UserError for flags that do not fit together, and if the processes
    cannot connect.
    """
    starter: str | None = None
    if (coordinator, num_processes, process_id) == (None, None, None):
        if not (found := cluster(os.environ)):
            return
        starter, number = found
        first, where = number == "0", f"the processes that {starter} has started"
    else:
        _check_flags(coordinator, num_processes, process_id)
        if num_processes == 1:
            return
        first, where = process_id == 0, f"the {num_processes} processes at {coordinator}"
    if first:
        print(f"... joining {where} (at most {start_timeout} s)", flush=True)
    jax.config.update("jax_enable_preemption_service", True)
    faulthandler.disable()  # its dump would hide the line with which JAX aborts when a process is lost
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            # With the flags JAX must not look at Slurm's variables: it would take one GPU per process.
            cluster_detection_method=None if starter else "deactivate",
            initialization_timeout=start_timeout,
            heartbeat_timeout_seconds=heartbeat,
        )
    except (ValueError, RuntimeError) as error:
        if starter == "the TPU" and isinstance(error, ValueError):  # its library is installed, but there is no TPU
            return
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"cannot join {where} ({reason}): start all processes within {start_timeout} s, with the same "
            "coordinator and a free port."
        ) from error
    if several() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else a background job
        signal.signal(signal.SIGINT, _interrupted)  # JAX's callbacks could swallow a KeyboardInterrupt


def _check_flags(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    host, _, port = (coordinator or "").rpartition(":")
    fits = bool(host) and port.isdigit() and 0 < int(port) < 65536 and process_id in range(num_processes or 0)
    with contextlib.suppress(OSError):  # a host that nobody knows
        if fits and socket.getaddrinfo(host.strip("[]"), int(port)):
            return
    raise UserError(
        f"--coordinator is {coordinator}, --num_processes {num_processes} and --process_id {process_id}: give "
        "HOST:PORT of process 0, the number of processes and the number of this one, counted from 0; or none of "
        "the three under Slurm, Open MPI, Kubernetes or on a TPU."
    )


def cluster(environment: Mapping[str, str]) -> tuple[str, str | None] | None:
    """Returns (what started several processes, this one's number if it says so), or None if nothing did.

    JAX finds the same and more, but also joins where a process is alone, as in an interactive job.
    """
    if "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", 1)) > 1:
        return "Slurm", environment["SLURM_PROCID"]
    if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        if "OMPI_MCA_orte_hnp_uri" not in environment:
            raise UserError(
                "Open MPI 5 does not say where process 0 is: add --coordinator=HOST:PORT "
                "--num_processes=$OMPI_COMM_WORLD_SIZE --process_id=$OMPI_COMM_WORLD_RANK."
            )
        return "Open MPI", environment["OMPI_COMM_WORLD_RANK"]
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return "Kubernetes", environment["JOB_COMPLETION_INDEX"]
    return ("the TPU", None) if importlib.util.find_spec("libtpu") else None


# ---- Ending --------------------------------------------------------------------------------


@contextlib.contextmanager
def ends_all() -> Iterator[None]:
    """Ends one of several processes at once, with one sentence, when an error stops only this process.

    An orderly exit would wait for the other processes, which wait for this one. They end when they miss it:
    after the heartbeat timeout of `join`, or at once if this is process 0.
    """
    try:
        yield
    except (Everywhere, SystemExit):
        raise
    except BaseException as error:
        if not several():
            raise
        sys.stdout.flush()
        _end(_sentence(error) or "".join(traceback.format_exception(error)))


def _end(text: str) -> NoReturn:
    """Ends this process at once; also called in a signal handler, where Python's streams may be in use."""
    who = f"process {jax.process_index()} of {jax.process_count()}"
    os.write(2, f"{Path(sys.argv[0]).name}: {who}: {text.rstrip()}\n".encode())
    os._exit(1)


def _interrupted(number: int, frame: FrameType | None) -> None:
    _end("interrupted; the same command continues from the last checkpoint.")


def _sentence(error: BaseException) -> str | None:
    """The message for an error that stops one process, or None for a bug."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, jax.errors.JaxRuntimeError) or (isinstance(error, ValueError) and "Gloo" in str(error)):
        reason = str(error).partition("\n")[0]
        return out_of_memory(error) or (
            f"an operation across processes failed ({reason}). If another process has ended, its output says "
            "why. Start all processes again: the same command continues from the last checkpoint."
        )
    return None


# ---- Agreeing ------------------------------------------------------------------------------


def from_first(value: Any) -> Any:
    """Returns process 0's value, which JSON can hold, on all processes."""
    if not several():
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    text = text if is_first() else np.zeros(length, np.uint8)
    return json.loads(multihost_utils.broadcast_one_to_all(text).tobytes())


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Raises a UserError that one process raises inside on all processes, at the end."""
    sentence = b""
    try:
        yield
    except UserError as error:
        if not several():
            raise
        sentence = str(error).encode()[:MESSAGE_BYTES]
    if several():
        everyone = multihost_utils.process_allgather(np.frombuffer(sentence.ljust(MESSAGE_BYTES, b"\0"), np.uint8))
        failed = np.flatnonzero(everyone[:, 0])
        if len(failed):
            text = everyone[failed[0]].tobytes().rstrip(b"\0").decode(errors="replace")
            alone = len(failed) < len(everyone)
            raise Everywhere(f"process {failed[0]} of {len(everyone)}: {text}" if alone else text)


def first_then_others(work: Callable[[], Result]) -> Result:
    """Returns work(), run on process 0 before the others, which then find what it has left on the disk."""
    for turn in (True, False):
        with together():
            if is_first() is turn:
                result = work()
    return result


def check_same(facts: Mapping[str, Any], remedy: str = "start all processes with the same command") -> None:
    """Raises Everywhere if the processes have different facts, {name: value that JSON can hold}."""
    mine = json.loads(json.dumps(facts))
    theirs = from_first(mine)
    with together():
        for name in sorted({*theirs, *mine}):
            if theirs.get(name) != mine.get(name):
                raise UserError(f"{name} is {mine.get(name)!r} here and {theirs.get(name)!r} on process 0: {remedy}.")


def comparable(config: ConfigDict) -> dict[str, Any]:
    """Returns the fields of a config that all processes must share, by name."""
    return {name: value for name, value in flatten(config).items() if name not in MAY_DIFFER}


def agree_on_checkpoint(source: str | None, which: str = "best", ema: bool = False) -> str | int:
    """Returns the checkpoint of a source of weights that all processes read, though its run may go on.

    A step, if there are several processes and the source is a run directory, otherwise `which`.
    """
    from convit_jax.weights.run import find_step  # heavy

    step: str | int = which
    with together():
        if several() and is_first() and is_run(source):
            step = find_step(Path(str(source)).expanduser(), which, ema)
    return from_first(step)
