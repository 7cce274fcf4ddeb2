"""Real processes over loopback: one training, whatever happens to one of them."""

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import socket

import pytest
from conftest import QUICK, ROOT, assert_same, python_process, saved, wait_until

from convit_jax.config import flatten
from convit_jax.errors import UserError
from convit_jax.rundir import read_metrics
from convit_jax.training import distributed
from convit_jax.training.loop import train

STEPS = 24  # enough for a signal to come in the middle
# What Gloo, the preemption service and Orbax print; several threads of Gloo do so at once, in pieces.
NOISE = re.compile(
    r"(\[Gloo\] Rank|is connected to|peer ranks\.|Expected number of connected peer ranks is :|\d+|\s)*"
    r"|W.* (SIGTERM caught at|Reached preemption sync point).*\n"
)


@contextlib.contextmanager
def two(command, *, slurm_tasks, flags=False, **environment):
    """Two processes of a command, with two devices each, until the end of the context."""
    with socket.socket() as trial:  # the system does not give its port again soon
        trial.bind(("127.0.0.1", 0))
        port = trial.getsockname()[1]
    xla = f"--xla_force_host_platform_device_count=2 {QUICK}"
    # What srun sets, and JAX reads.
    slurm = {"SLURM_JOB_ID": "4711", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": slurm_tasks}
    slurm |= {"SLURM_STEP_NUM_NODES": "1", "JAX_COORDINATOR_PORT": f"{port}"}
    with contextlib.ExitStack() as stack:
        processes = []
        for index in range(2):
            which = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={index}"] if flags else []
            slurm |= {"SLURM_PROCID": f"{index}", "SLURM_LOCALID": f"{index}"}
            process = python_process(*command, *which, xla_flags=xla, **environment, **slurm)
            processes.append(stack.enter_context(process))
        yield processes


def ends(processes):
    """[(exit status, output, errors)] of processes, without noise."""
    ended = []
    for process in processes:
        texts = process.communicate(timeout=300)
        lines = [[line for line in text.splitlines(True) if not NOISE.fullmatch(line)] for text in texts]
        ended.append((process.returncode, *map("".join, lines)))
    return ended


# What happens after the stop, in processes of which each step needs both.
WORKER = """
import sys; sys.path.insert(0, "@ROOT@")
import jax, numpy as np
from absl import flags
from jax.experimental import multihost_utils
from convit_jax import cli, evaluate
from convit_jax.errors import UserError
from convit_jax.training.distributed import Everywhere, say
from convit_jax.training.loop import train

def main(_):
    values, config = flags.FLAGS, flags.FLAGS.config
    say("GPUs of a process: " + jax.config.values["jax_cuda_visible_devices"])
    train(config, values.checkpoint)
    print("EVALUATION", file=sys.stderr)
    evaluate.main([])
    print("DIFFERENCES", file=sys.stderr)
    try:
        values.mask = "position_embedding" if jax.process_index() else None
        evaluate.main([])
    except Everywhere as error:
        say(error)
    try:
        config.optim.lr = float(jax.process_index())
        train(config, values.checkpoint)
    except Everywhere as error:
        say(error)
    if jax.process_index():
        raise UserError("these images cannot be read.")
    while True:
        multihost_utils.process_allgather(np.zeros(1))

cli.launch("worker", main, define=evaluate._define_flags, config="", processes=True)
"""


def test_two_stop_and_continue_together_as_one_would_and_what_ends_one_ends_both(digits_config, tmp_path):
    config = digits_config  # with randomness; the same global batch for any number of devices
    config.steps, config.log_every, config.model.drop_path_rate, config.augment.mixup = STEPS, 1, 0.2, 0.8
    config.model.depth, config.model.local_up_to_layer, config.mesh.data, config.mesh.fsdp = 2, 1, 2, 2
    train(config, tmp_path / "one")
    config.data.resize, config.data.canvas = "device", 16

    # ---- Slurm starts both, and stops one --------------------------------------------------------
    run = tmp_path / "two"
    run.mkdir()
    (run / "compiled").symlink_to(os.environ["JAX_COMPILATION_CACHE_DIR"])
    own = tmp_path / "own"  # compiled programs are not kept where only one machine may see them
    config.compilation_cache = str(own)
    fields = {n: v for n, v in flatten(config).items() if v is not None and not isinstance(v, list)}
    settings = [f"--config.{name}={value}" for name, value in fields.items()]
    with two(["train.py", f"--workdir={run}", *settings], slurm_tasks="2") as processes:
        wait_until(lambda: any(line["step"] >= 4 for line in read_metrics(run / "metrics.jsonl")), *processes)
        processes[1].send_signal(signal.SIGUSR1)  # passed on as SIGTERM
        (status, output, errors), other = ends(processes)
    assert (status, errors) == (0, ""), errors
    assert other == (0, "", "")  # process 1 writes nothing
    assert "... joining the other processes" in output
    assert "4 x cpu (data 2, fsdp 2) of 2 processes" in output
    assert output.count("Stopped by SIGTERM at step") == 1
    assert not own.exists()
    step = int(saved(run)["state"]["step"])
    assert 4 < step < STEPS
    assert read_metrics(run / "metrics.jsonl")[-1]["step"] == step

    # ---- The same run goes on, without a damaged checkpoint; the flags overrule Slurm's job ------
    damaged = shutil.copytree(run / f"checkpoints/{step}", run / f"checkpoints/{step + 1}")
    for file in damaged.glob("state/ocdbt.process_0/d/*"):
        os.truncate(file, 0)
    script = tmp_path / "worker"
    script.write_text(WORKER.replace("@ROOT@", str(ROOT)))
    command = [script, f"--checkpoint={run}", "--which=latest", "--heartbeat_timeout=5"]
    with two(command, slurm_tasks="1", flags=True, JAX_LOG_COMPILES="1") as processes:
        (status, output, errors), (other_status, nothing, other_errors) = ends(processes)
    assert (bool(status), bool(other_status), nothing) == (True, True, ""), errors
    assert "GPUs of a process: all" in output  # not Slurm's SLURM_LOCALID, one GPU of eight
    assert re.search(rf"cannot read {damaged} \(.*\)\nContinuing at step {step}\n", output)
    assert [path.name for path in sorted(run.glob("damaged/*/*"))] == [str(step + 1), "metrics.jsonl"]
    assert_same(saved(run), saved(tmp_path / "one"), atol=2e-5, rtol=1e-4)
    one, last = (read_metrics(path / "metrics.jsonl")[-1] for path in (tmp_path / "one", run))
    for name in ("nonlocality", "gates"):
        assert last[name] == [pytest.approx(heads, abs=2e-4) for heads in one[name]]

    result = "top-1 {val_top1:.3f}  top-5 {val_top5:.3f}  loss {val_loss:.3f}  images 360\n".format(**last)
    assert result in output
    evaluation = errors.partition("EVALUATION")[2].partition("DIFFERENCES")[0]
    gathered = [line for line in evaluation.splitlines() if "Compiling" in line and "_identity_fn" in line]
    assert not any("float32" in line for line in gathered)  # sentences only: the weights are not sent around

    assert "\nprocess 1 of 2: optim.lr is 1.0 here and 0.0 on process 0: start all" in output
    assert "\nprocess 1 of 2: the digest of the weights is " in output
    assert other_errors.splitlines()[-1] == "worker: process 1 of 2: these images cannot be read."
    assert "worker: process 0 of 2: an operation across processes failed (" in errors.splitlines()[-1]


# Both processes stay in collective operations until something happens to one of them.
LOST = """
import sys; sys.path.insert(0, "@ROOT@")
import numpy as np
from convit_jax import cli
from jax.experimental import multihost_utils

def main(_):
    for number in range(100_000):
        multihost_utils.process_allgather(np.zeros(1))
        if number == 3:
            print("started", flush=True)

cli.launch("worker", main, processes=True)
"""


@pytest.mark.parametrize(
    ("number", "sentence"),
    [(signal.SIGINT, "process 1 of 2: interrupted; the same command continues"), (signal.SIGKILL, "")],
)
def test_ctrl_c_or_loss_of_one_process_ends_both(tmp_path, number, sentence):
    script = tmp_path / "worker"
    script.write_text(LOST.replace("@ROOT@", str(ROOT)))
    with two([script, "--heartbeat_timeout=5"], slurm_tasks="2") as processes:
        for process in processes:
            while process.stdout.readline() != "started\n":
                assert process.poll() is None, process.communicate()
        processes[1].send_signal(number)
        (status, _, errors), (other_status, _, other_errors) = ends(processes)
    assert status != 0
    assert other_status != 0
    assert sentence in other_errors
    assert len(other_errors.splitlines()) == bool(sentence)
    assert "process 0 of 2: an operation across processes failed (" in errors.splitlines()[-1]


def test_a_bug_in_one_process_ends_it_at_once_with_its_trace(monkeypatch, capfd):
    def leave(status):
        raise SystemExit(status)

    monkeypatch.setattr(distributed, "several", lambda: True)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit), distributed.ends_all():
        raise KeyError("a bug")
    assert "Traceback" in capfd.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [("node1", 2, 0), ("localhost:99999", 2, 0), ("localhost:1234", 2, 2), ("no host:1234", 2, 1), (None, None, 0)],
)
def test_flags_that_do_not_fit_together(flags):
    with pytest.raises(UserError, match=rf"--coordinator is {flags[0]}, .* give HOST:PORT of process 0"):
        distributed.join(*flags, start_timeout=1, heartbeat=1)


def test_who_started_several_processes(monkeypatch):
    slurm = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_LOCALID": "0", "SLURM_PROCID": "1"}
    mpi = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
    assert distributed.cluster({}) is None
    assert distributed.cluster({**slurm, "SLURM_NTASKS": "1"}) is None
    assert distributed.cluster({**slurm, "SLURM_NTASKS": "2"}) == distributed.cluster(mpi) == "1"
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"}
    assert distributed.cluster(pod) is None  # a job of one pod needs no package
    monkeypatch.setenv(distributed.POD, "3")
    with pytest.raises(UserError, match="pod 3 of a Job, and cannot join the others"):
        distributed.join(None, None, None, 1, 1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "kubernetes")
    assert distributed.cluster(pod) == "3"
