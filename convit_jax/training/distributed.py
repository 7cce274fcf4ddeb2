"""Several processes as one training: they join, agree on what happens, and end together.

Each process runs the same program on its own devices. What one of them alone knows (its disk, its
images, a signal) and what decides the next collective operation is agreed upon first, else the others
would wait forever. Process 0 prints and writes; the others say nothing but what stops them.
"""

import contextlib
import importlib.util
import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from convit_jax.config import flatten
from convit_jax.errors import UserError, out_of_memory

COMMAND = Path(sys.argv[0]).name
# Fields that may differ between processes; images and teacher are compared, their paths are not.
MAY_DIFFER = ("data.dir", "data.workers", "distill.teacher")
SENTENCE = 1000  # bytes of an error that other processes are told
REDUCED = 4 * 2**20  # bytes of the timed all-reduce

# A process whose partner is gone is aborted by JAX's own threads, where no Python runs any more. Python's
# handler of SIGABRT is C and still writes the signal's number to a pipe; this, at its end, says what it was.
WITNESS = """
import os, signal
for ours in (signal.SIGINT, signal.SIGTERM):
    signal.signal(ours, signal.SIG_IGN)
said = b""
while chunk := os.read(0, 4096):
    said += chunk
    if bytes([signal.SIGABRT]) in chunk:
        os.write(2, said.split(b"\\0")[-2].lstrip(bytes(range(32))) + b"\\n")
        break
"""


class Everywhere(UserError):
    """An error that every process raises at the same point; process 0 says it."""


def is_first():
    """Whether this is the process that prints and writes."""
    return jax.process_index() == 0


def several():
    """Whether there are other processes."""
    return jax.process_count() > 1


def say(text):
    """A line, from the first of several processes."""
    if is_first():
        print(text, flush=True)


def warn(text):
    """A line to the error stream, from any process."""
    print(f"process {jax.process_index()} of {jax.process_count()}: {text}", file=sys.stderr, flush=True)


def phase(text):
    """Name what begins now, so that a hang is known by the last line; only where others may be waited for."""
    if several():
        say(f"... {text}")


# ---- Joining -------------------------------------------------------------------------------


def join(coordinator=None, num_processes=None, process_id=None, start_timeout=300, heartbeat=100):
    """Join the other processes, before anything else is asked of JAX; nothing happens if there are none.

    Args:
      coordinator, num_processes, process_id: "HOST:PORT" of process 0, and which this one is; all of them,
        or none: then JAX asks Slurm, Open MPI, Kubernetes or the TPU. With them a process takes all devices
        of its machine, or those in JAX_LOCAL_DEVICE_IDS.
      start_timeout: seconds to wait for the others. heartbeat: seconds without a sign of life after which
        a process counts as gone.

    Raises:
      UserError: flags that do not fit together, or an address that cannot be had.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    for name, seconds in (("start_timeout", start_timeout), ("heartbeat_timeout", heartbeat)):
        if seconds < 1:
            raise UserError(f"--{name} is {seconds}: it must be at least 1 second.")
    found = None
    if not missing:
        check_flags(coordinator, num_processes, process_id)
        if num_processes == 1:
            return
        where, rank = f"the {num_processes} processes at {coordinator}", process_id
    elif len(missing) < len(given):
        raise UserError(
            f"--{missing[0]} is missing: --coordinator=HOST:PORT, --num_processes and --process_id "
            "are given together, or left out where Slurm, Open MPI, Kubernetes or a TPU tells them."
        )
    else:
        found = cluster(os.environ)
        if found is None:
            return
        where, rank = f"the processes that {found[0]} has started", found[1]
    if rank == 0:
        print(f"... joining {where} (at most {start_timeout} s)", flush=True)
    tell = witness()
    tell(
        f"{COMMAND}: the other processes were not there after {start_timeout} s: start all of them, with "
        "the same coordinator and num_processes and a process_id of each its own, and let no firewall "
        "be between them."
    )
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM, which is the loop's
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            # Else JAX asks all the same, and inside any step of Slurm takes one GPU a process.
            cluster_detection_method=None if found else "deactivate",
            initialization_timeout=start_timeout,
            heartbeat_timeout_seconds=heartbeat,
        )
    except ValueError as error:
        if found and found[0] == "the TPU":  # its library is installed, but there is none
            return
        raise UserError(f"JAX cannot join {where}: {error}") from error
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"JAX cannot join {where} ({reason}): start all of them anew.") from error
    tell(
        f"{COMMAND}: process {jax.process_index()} of {jax.process_count()} was ended because another one "
        f"has ended, or has given no sign of life for {heartbeat} s; its own output tells why. Start all of "
        "them again: the same command continues from the last checkpoint."
    )


def check_flags(coordinator, num_processes, process_id):
    """Raise UserError for explicit flags that cannot be meant."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator is {coordinator!r}: give HOST:PORT of process 0, as node1:12345.")
    if num_processes < 1 or not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id is {process_id} and --num_processes {num_processes}: ids count from 0 to one "
            "less than the number of processes."
        )
    try:
        address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except OSError as error:
        raise UserError(f"--coordinator names {host!r}, which is no known host: give process 0's.") from error
    if process_id == 0:
        family = socket.AF_INET6 if socket.has_ipv6 else address[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind(("", int(port)))
            except OSError as error:
                raise UserError(
                    f"port {port} of --coordinator cannot be had ({error.strerror}): take another one, the "
                    "same for all processes."
                ) from error


def cluster(environment):
    """(who started several processes, this one's rank or None if only JAX can tell), or None."""
    for name, size, rank, needed in (
        ("Slurm", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_NODELIST"),
        ("Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ):
        if needed in environment and rank in environment and int(environment.get(size, 1)) > 1:
            if name == "Open MPI" and "OMPI_MCA_orte_hnp_uri" not in environment:
                raise UserError(
                    "Open MPI 5 tells nobody where process 0 is: add --coordinator=HOST:PORT "
                    "--num_processes=$OMPI_COMM_WORLD_SIZE --process_id=$OMPI_COMM_WORLD_RANK."
                )
            return name, int(environment[rank])
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return "Kubernetes", int(environment["JOB_COMPLETION_INDEX"])
    if importlib.util.find_spec("libtpu"):
        return "the TPU", None
    return None


def witness():
    """Start a small process that says a sentence if this one is aborted; returns what sets the sentence."""
    read, write = os.pipe()
    command = [sys.executable, "-S", "-E", "-c", WITNESS]
    os.posix_spawn(sys.executable, command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, read, 0)])
    os.close(read)  # the other end is closed when this process is gone, and the small one ends
    os.set_blocking(write, False)
    signal.signal(signal.SIGABRT, lambda *_: None)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    return lambda sentence: os.write(write, sentence.encode() + b"\0")


@contextlib.contextmanager
def ends_all():
    """What stops only this process ends it at once: in an orderly end it would wait for the others.

    Those find it gone after the time that `join` was given, at once if it is process 0.
    """
    try:
        yield
    except (Everywhere, SystemExit):
        raise
    except BaseException as error:
        if not several():
            raise
        who = f"{COMMAND}: process {jax.process_index()} of {jax.process_count()}"
        device_error = isinstance(error, jax.errors.JaxRuntimeError)
        if isinstance(error, UserError):
            print(f"{who}: {error}", file=sys.stderr)
        elif isinstance(error, KeyboardInterrupt):
            print(f"{who}: interrupted", file=sys.stderr)
        elif device_error and (sentence := out_of_memory(error)):
            print(f"{who}: {sentence}", file=sys.stderr)
        elif device_error:
            reason = str(error).partition("\n")[0]
            print(
                f"{who}: an operation on the devices failed ({reason}); if another process has ended, its "
                "own output tells why. Start all again: the same command continues from the last checkpoint.",
                file=sys.stderr,
            )
        else:
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


# ---- Agreeing ------------------------------------------------------------------------------


def from_first(value):
    """Process 0's value (anything that JSON holds), on all processes."""
    if not several():
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    text = text if is_first() else np.zeros(length, np.uint8)
    return json.loads(multihost_utils.broadcast_one_to_all(text).tobytes())


@contextlib.contextmanager
def together():
    """A UserError of one process inside is raised by all of them at the end."""
    sentence = b""
    try:
        yield
    except UserError as error:
        if not several():
            raise
        sentence = str(error).encode()[:SENTENCE]
    if several():
        told = np.zeros(SENTENCE, np.uint8)
        told[: len(sentence)] = np.frombuffer(sentence, np.uint8)
        told = multihost_utils.process_allgather(told)
        failed = np.flatnonzero(told[:, 0])
        if len(failed):
            text = told[failed[0]].tobytes().rstrip(b"\0").decode(errors="replace")
            alone = len(failed) < len(told)
            raise Everywhere(f"process {failed[0]} of {len(told)}: {text}" if alone else text)


def in_turns(work):
    """What work() gives: first on process 0, then on the others, which find on the disk what it has made."""
    for turn in (True, False):
        with together():
            if is_first() is turn:
                result = work()
    return result


def comparable(config):
    """Returns the fields of a config that all processes must have alike, {"optim.lr": 0.0005, ...}."""
    return {name: value for name, value in flatten(config).items() if name not in MAY_DIFFER}


def check_same(facts, remedy="start all processes with the same command"):
    """Raise Everywhere if the processes have different facts, {name: value}; see `together`."""
    mine = json.loads(json.dumps(facts))
    theirs = from_first(mine)
    with together():
        for name in sorted({*theirs, *mine}):
            if theirs.get(name) != mine.get(name):
                raise UserError(
                    f"{name} is {mine.get(name)!r} here and {theirs.get(name)!r} on process 0: {remedy}."
                )


def time_all_reduce(mesh):
    """(bytes, seconds) of an all-reduce of so much from every device, after one that made the connections."""
    everywhere = NamedSharding(Mesh(mesh.devices.ravel(), "device"), PartitionSpec("device"))
    rows = np.ones((len(mesh.local_devices), REDUCED // 4), np.float32)
    values = jax.make_array_from_process_local_data(everywhere, rows)
    replicated = NamedSharding(everywhere.mesh, PartitionSpec())
    total = jax.jit(lambda values: jnp.sum(values, 0), out_shardings=replicated)
    jax.block_until_ready(total(values))
    began = time.monotonic()
    jax.block_until_ready(total(values))
    return REDUCED, time.monotonic() - began


def introduce(mesh):
    """Say who takes part, and time one all-reduce; a hang here is one of the network."""
    if several():
        local = len(mesh.local_devices)
        say(f"{jax.process_count()} processes with {local} devices each, {mesh.size} in all")
        phase("first all-reduce over all devices")
        size, seconds = time_all_reduce(mesh)
        say(f"All-reduce of {size / 2**20:.0f} MiB a device in {1000 * seconds:.1f} ms")
