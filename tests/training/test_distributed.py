"""Real processes over loopback: one training, whatever happens to one of them."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import QUICK, ROOT, assert_same, saved

from convit_jax.config import flatten
from convit_jax.errors import UserError
from convit_jax.rundir import read_metrics
from convit_jax.training.distributed import cluster, join
from convit_jax.training.loop import train

STEPS = 24  # enough for a signal to come in the middle
# What Gloo and the preemption service print; several threads of Gloo do so at once, in pieces.
NOISE = re.compile(
    r"(\[Gloo\] Rank|is connected to|peer ranks\.|Expected number of connected peer ranks is :|\d+|\s)*"
    r"|W.* SIGTERM caught at .*\n"
)


def free_port():
    """A port that is free: the system does not give it again soon."""
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return trial.getsockname()[1]


def training(config, workdir):
    """The command of a training, whose processes find in RUN/compiled what the suite has compiled before."""
    compiled, suite = workdir / "compiled", os.environ["JAX_COMPILATION_CACHE_DIR"]
    if not compiled.is_symlink():
        os.makedirs(suite, exist_ok=True)
        workdir.mkdir(exist_ok=True)
        compiled.symlink_to(suite)
    fields = {n: v for n, v in flatten(config).items() if v is not None and not isinstance(v, list)}
    settings = [f"--config.{name}={value}" for name, value in fields.items()]
    return ["train.py", f"--workdir={workdir}", *settings]


class Two:
    """Two processes of a command, with two devices each, in a `with` that ends both."""

    def __init__(self, command, *flags, slurm=False, per_process=([], [])):
        port = free_port()
        warnings = ["-W", "error", "-W", "ignore:the load_module"]  # ml_collections on Python 3.11
        self.processes = []
        for index in range(2):
            xla = f"--xla_force_host_platform_device_count=2 {QUICK}"
            ours = {**os.environ, "XLA_FLAGS": xla, "PYTHONUNBUFFERED": "1"}
            # Otherwise a compiled program belongs to the name of its folder.
            ours["JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES"] = "none"
            which = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={index}"]
            if slurm:  # what srun sets, and JAX reads
                which = []
                ours |= {"SLURM_JOB_ID": "4711", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
                ours |= {"SLURM_PROCID": f"{index}", "SLURM_LOCALID": f"{index}"}
                ours |= {"SLURM_STEP_NUM_NODES": "1", "JAX_COORDINATOR_PORT": f"{port}"}
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, *warnings, *command, *flags, *which, *per_process[index]],
                    cwd=ROOT,
                    env=ours,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for process in self.processes:
            process.kill()
            process.communicate()

    def wait_for_step(self, workdir, step):
        """Waits until metrics.jsonl has this step."""
        deadline = time.monotonic() + 300
        while not any(line["step"] >= step for line in read_metrics(workdir / "metrics.jsonl")):
            for process in self.processes:
                assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def ends(self):
        """[(exit status, output, errors)] of the processes, without noise."""
        ended = []
        for process in self.processes:
            texts = process.communicate(timeout=300)
            lines = [[line for line in text.splitlines(True) if not NOISE.fullmatch(line)] for text in texts]
            ended.append((process.returncode, *map("".join, lines)))
        return ended


@pytest.fixture
def config(digits_config):
    """Everything random on; the same global batch for any number of devices."""
    digits_config.steps = STEPS
    digits_config.log_every = 1
    digits_config.augment.mixup = 0.8
    digits_config.augment.cutmix = 1.0
    digits_config.model.drop_path_rate = 0.2
    digits_config.model.drop_rate = 0.1
    digits_config.mesh.data, digits_config.mesh.fsdp = 2, 2
    return digits_config


@pytest.fixture
def whole(config, tmp_path_factory):
    """The run directory of two processes that nothing disturbed, made once."""
    workdir = tmp_path_factory.getbasetemp() / "whole"
    if not workdir.exists():
        with Two(training(config, workdir)) as two:
            (status, output, errors), other = two.ends()
        assert (status, errors) == (0, ""), errors
        assert other == (0, "", "")  # process 1 writes nothing
        assert "2 processes with 2 devices each, 4 in all" in output
        assert "Done: top-1" in output
    return workdir


def test_two_train_as_one(config, whole, tmp_path):
    train(config, tmp_path)
    assert_same(saved(tmp_path)["state"]["params"], saved(whole)["state"]["params"], atol=2e-5)
    one, two = (read_metrics(path / "metrics.jsonl")[-1] for path in (tmp_path, whole))
    for name in ("nonlocality", "gates"):
        assert two[name] == [pytest.approx(heads, abs=2e-4) for heads in one[name]]


def test_sigterm_to_one_saves_once_on_both_and_the_same_command_continues(config, whole, tmp_path):
    own = tmp_path / "own"  # compiled programs are not kept where only one machine may see them
    command = [*training(config, tmp_path / "parts"), f"--config.compilation_cache={own}"]
    with Two(command, slurm=True) as two:
        two.wait_for_step(tmp_path / "parts", 4)
        two.processes[1].send_signal(signal.SIGTERM)
        (status, output, errors), other = two.ends()
    assert (status, errors) == (0, ""), errors
    assert other == (0, "", "")
    assert "... joining the processes that Slurm has started" in output
    assert output.count("Stopped by SIGTERM at step") == 1
    assert not own.exists()
    step = int(saved(tmp_path / "parts")["state"]["step"])
    assert 4 < step < STEPS
    assert read_metrics(tmp_path / "parts/metrics.jsonl")[-1]["step"] == step
    with Two(training(config, tmp_path / "parts")) as two:
        assert [status for status, _, _ in two.ends()] == [0, 0]
    assert_same(saved(whole), saved(tmp_path / "parts"))


# A program that stays in collective operations until something happens to it.
WORKER = """
import sys; sys.path.insert(0, "@ROOT@")
import numpy as np
from absl import app, flags
from convit_jax import cli
from convit_jax.errors import UserError
from jax.experimental import multihost_utils
flags.DEFINE_bool("bad", False, "")

def main(arguments):
    for number in range(10_000):
        multihost_utils.process_allgather(np.zeros(1))
        if number == 3:
            print("started", flush=True)
        if number == 10 and flags.FLAGS.bad:
            raise UserError("these images cannot be read.")

cli.launch("worker", main, processes=True)
"""


@pytest.mark.parametrize(
    ("number", "index", "sentence"),
    [
        (None, 1, "worker: process 1 of 2: these images cannot be read.\n"),
        (signal.SIGINT, 1, "process 1 of 2: interrupted; the same command continues"),
        (signal.SIGKILL, 1, ""),
        (signal.SIGKILL, 0, ""),  # holds them together
    ],
)
def test_what_ends_one_ends_both(tmp_path, number, index, sentence):
    script = tmp_path / "worker"
    script.write_text(WORKER.replace("@ROOT@", str(ROOT)))
    bad = [["--bad"] if number is None and each == index else [] for each in range(2)]
    with Two([script], "--heartbeat_timeout=5", per_process=bad) as two:
        for process in two.processes:
            while process.stdout.readline() != "started\n":
                assert process.poll() is None, process.communicate()
        began = time.monotonic()
        if number:
            two.processes[index].send_signal(number)
        ended = two.ends()
    assert time.monotonic() - began < 40
    (status, _, errors), (other_status, _, other_errors) = ended[index], ended[1 - index]
    assert status != 0
    assert other_status != 0
    assert sentence in errors
    assert len(errors.splitlines()) == bool(sentence)
    if index == 1:  # Python still runs on process 0, where JAX aborts the others
        assert len(other_errors.splitlines()) == 1
        assert "process 0 of 2: an operation across processes failed (" in other_errors
    else:
        assert "JAX distributed service detected fatal errors" in other_errors


def test_processes_that_were_started_differently_are_told(config, tmp_path):
    lrs = (["--config.optim.lr=1"], ["--config.optim.lr=2"])
    with Two(training(config, tmp_path / "run"), per_process=lrs) as two:
        (status, _, errors), (other, _, silence) = two.ends()
    assert (status, other, silence) == (1, 1, "")
    assert errors.startswith("train.py: process 1 of 2: optim.lr is 2.0 here and 1.0 on process 0"), errors


def test_two_evaluate_as_one_and_send_no_weights_to_each_other(whole, monkeypatch):
    monkeypatch.setenv("JAX_LOG_COMPILES", "1")
    with Two(["-m", "convit_jax.evaluate", f"--checkpoint={whole}", "--which=latest"]) as two:
        (status, output, errors), (other, nothing, _) = two.ends()
    assert (status, other, nothing) == (0, 0, ""), errors
    last = read_metrics(whole / "metrics.jsonl")[-1]
    expected = "top-1 {val_top1:.3f}  top-5 {val_top5:.3f}  loss {val_loss:.3f}  images 360".format(**last)
    assert output.splitlines()[-1] == expected
    gathered = [line for line in errors.splitlines() if "Compiling" in line and "_identity_fn" in line]
    assert gathered  # JAX's all-gather of arrays that each process has: of sentences,
    assert not any("float32" in line for line in gathered)


def test_two_that_would_evaluate_different_weights_are_told(whole):
    command = ["-m", "convit_jax.evaluate", f"--checkpoint={whole}"]
    with Two(command, per_process=([], ["--mask=position_embedding"])) as two:
        (status, _, errors), (other, _, silence) = two.ends()
    assert (status, other, silence) == (1, 1, "")
    assert errors.startswith("evaluate: process 1 of 2: the digest of the weights is "), errors


def test_the_flags_overrule_slurm_and_a_process_that_waits_in_vain_ends():
    script = (
        "import logging; logging.basicConfig(level=logging.INFO); "
        f"from convit_jax.training.distributed import join; join('127.0.0.1:{free_port()}', 2, 0, 1)"
    )
    inside = {**os.environ, "SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "1"}
    inside |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}  # of `srun --pty bash`
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=inside, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0
    assert "Connecting to JAX distributed service" in done.stderr
    assert "visible devices" not in done.stderr  # otherwise Slurm's SLURM_LOCALID, one GPU of eight
    assert "... joining the 2 processes at 127.0.0.1:" in done.stdout
    assert "JAX distributed service detected fatal errors" in done.stderr


@pytest.mark.parametrize(
    ("coordinator", "processes", "process", "sentence"),
    [
        ("node1", 2, 0, "--coordinator is 'node1': give HOST:PORT of process 0"),
        ("node1:99999", 2, 0, "--coordinator is 'node1:99999': give HOST:PORT"),
        ("localhost:1234", 2, 2, "--process_id is 2 and --num_processes 2: ids count from 0"),
        ("localhost:1234", 0, 0, "--process_id is 0 and --num_processes 0"),
        ("no host:1234", 2, 1, "--coordinator names the unknown host 'no host'"),
        ("localhost:1234", None, 0, "--num_processes is missing: give --coordinator=HOST:PORT"),
        (None, None, 0, "--coordinator is missing"),
    ],
)
def test_flags_that_do_not_fit_together(coordinator, processes, process, sentence):
    with pytest.raises(UserError, match=sentence):
        join(coordinator, processes, process)


def test_who_started_several_processes():
    slurm = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_LOCALID": "0", "SLURM_PROCID": "1"}
    mpi = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
    assert cluster({}) is None
    assert cluster({**slurm, "SLURM_NTASKS": "2"}) == ("Slurm", 1)
    assert cluster({**slurm, "SLURM_NTASKS": "1"}) is None
    assert cluster({**mpi, "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"}) == ("Open MPI", 1)
    with pytest.raises(UserError, match="Open MPI 5 does not say where process 0 is: add --coordinator"):
        cluster(mpi)
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"}
    assert cluster(pod) == ("Kubernetes", 3)
