"""Real processes over loopback, two devices each: one training, whatever happens to one of them."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import QUICK, ROOT, assert_same, saved

from convit_jax.config import flatten
from convit_jax.errors import UserError
from convit_jax.rundir import read_metrics
from convit_jax.training.distributed import cluster, join
from convit_jax.training.loop import train

STEPS = 24  # enough for a signal to come in the middle
# What Gloo prints of itself; several threads do so at once, so that the pieces come in any order.
GLOO = re.compile(
    r"(\[Gloo\] Rank|is connected to|peer ranks\.|Expected number of connected peer ranks is :|\d+|\s)*"
)


def free_port():
    """A port that nobody has: the system gives it once, and not again soon."""
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
    """Two processes of a command, by default train.py, with two devices each, in a `with` that ends both."""

    def __init__(self, config, workdir, *flags, command=None, slurm=False, per_process=([], [])):
        port = free_port()
        warnings = ["-W", "error", "-W", "ignore:the load_module"]  # ml_collections on Python 3.11
        command = [sys.executable, *warnings, *(command or training(config, workdir)), *flags]
        self.processes, self.workdir = [], workdir
        for index in range(2):
            xla = f"--xla_force_host_platform_device_count=2 {QUICK}"
            ours = {**os.environ, "XLA_FLAGS": xla, "PYTHONUNBUFFERED": "1"}
            # Else a compiled program belongs to the name of its folder.
            ours["JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES"] = "none"
            which = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={index}"]
            if slurm:  # what srun sets, and JAX reads
                which = []
                ours |= {"SLURM_JOB_ID": "4711", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
                ours |= {"SLURM_PROCID": f"{index}", "SLURM_LOCALID": f"{index}"}
                ours |= {"SLURM_STEP_NUM_NODES": "1", "JAX_COORDINATOR_PORT": f"{port}"}
            self.processes.append(
                subprocess.Popen(
                    [*command, *which, *per_process[index]],
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

    def wait_for_step(self, step):
        """Until metrics.jsonl has this step."""
        deadline = time.monotonic() + 300
        while not any(line["step"] >= step for line in read_metrics(self.workdir / "metrics.jsonl")):
            for process in self.processes:
                assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def ends(self, which=(0, 1)):
        """[(exit status, output, errors)] of the processes, without what Gloo says of itself."""
        ended = []
        for process in (self.processes[index] for index in which):
            output, errors = process.communicate(timeout=300)
            lines = [line for line in output.splitlines(True) if not GLOO.fullmatch(line)]
            ended.append((process.returncode, "".join(lines), errors))
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
    """The run directory of one process with four devices that nothing disturbed, made once."""
    workdir = tmp_path_factory.getbasetemp() / "whole"
    if not workdir.exists():
        train(config, workdir)
    return workdir


def test_a_signal_to_one_of_two_saves_together_and_one_process_continues(config, whole, tmp_path):
    own = tmp_path / "own"  # what was compiled is not kept where only one machine may see it
    with Two(config, tmp_path / "parts", f"--config.compilation_cache={own}", slurm=True) as two:
        two.wait_for_step(4)
        two.processes[1].send_signal(signal.SIGTERM)
        (status, output, errors), other = two.ends()
    assert (status, errors) == (0, ""), errors
    assert other == (0, "", "")  # process 1 writes nothing
    assert "... joining the processes that Slurm has started" in output
    assert "2 processes with 2 devices each, 4 in all" in output
    assert "All-reduce of 4 MiB" in output
    assert not own.exists()
    assert "Stopped by SIGTERM at step" in output
    step = int(saved(tmp_path / "parts")["state"]["step"])
    assert 4 < step < STEPS
    assert read_metrics(tmp_path / "parts/metrics.jsonl")[-1]["step"] == step

    train(config, tmp_path / "parts")
    assert_same(saved(whole)["state"]["params"], saved(tmp_path / "parts")["state"]["params"], atol=2e-5)


def test_two_continue_what_one_began_either_is_killed_the_other_ends_and_a_restart_is_exact(
    config, whole, tmp_path
):
    config.steps = 4
    train(config, tmp_path / "two")
    shutil.copytree(tmp_path / "two", tmp_path / "killed")
    config.steps = STEPS
    with Two(config, tmp_path / "two") as two:
        (status, output, errors), other = two.ends()
    assert (status, errors) == (0, ""), errors
    assert "Continuing at step 4" in output
    assert other == (0, "", "")
    assert_same(saved(whole)["state"]["params"], saved(tmp_path / "two")["state"]["params"], atol=2e-5)
    alone, together = (read_metrics(path / "metrics.jsonl")[-1] for path in (whole, tmp_path / "two"))
    np.testing.assert_allclose(together["nonlocality"], alone["nonlocality"], atol=2e-4)

    for step, index in ((8, 1), (12, 0)):  # process 0 holds them together and writes the log
        with Two(config, tmp_path / "killed", "--heartbeat_timeout=5") as two:
            two.wait_for_step(step)
            two.processes[index].kill()
            began = time.monotonic()
            ((status, _, errors),) = two.ends([1 - index])
        assert time.monotonic() - began < 30
        assert status != 0
        assert errors.strip().splitlines()[-1].startswith(f"train.py: process {1 - index} of 2"), errors
    with Two(config, tmp_path / "killed") as two:
        assert [status for status, _, _ in two.ends()] == [0, 0]
    assert_same(saved(tmp_path / "two"), saved(tmp_path / "killed"))


def test_images_that_one_process_cannot_read_any_more_end_both_with_its_sentence(
    config, image_folder, tmp_path
):
    config.data.name, config.batch_size, config.eval_batch_size = "folder", 8, 8
    config.epochs, config.steps, config.eval_every, config.locality.images = 100, None, 100, 0
    theirs = shutil.copytree(image_folder, tmp_path / "theirs")
    folders = [[f"--config.data.dir={folder}"] for folder in (image_folder, theirs)]
    with Two(config, tmp_path / "run", per_process=folders) as two:
        two.wait_for_step(4)
        (theirs / "train").rename(tmp_path / "gone")
        (status, _, errors), (other, nothing, silence) = two.ends()
    assert (status, other, nothing, silence) == (1, 1, "", "")
    sentence = f"train.py: process 1 of 2: cannot read the image {theirs}/train/"
    assert errors.startswith(sentence), errors
    assert len(errors.splitlines()) == 1


def test_processes_that_were_started_differently_are_told(config, tmp_path):
    with Two(config, tmp_path / "run", per_process=(["--config.optim.lr=1"], ["--config.optim.lr=2"])) as two:
        (status, _, errors), (other, _, silence) = two.ends()
    assert (status, other, silence) == (1, 1, "")
    assert errors.startswith("train.py: process 1 of 2: optim.lr is 2.0 here and 1.0 on process 0"), errors


def test_two_evaluate_as_one_and_send_no_weights_to_each_other(whole, monkeypatch):
    monkeypatch.setenv("JAX_LOG_COMPILES", "1")
    command = ["-m", "convit_jax.evaluate", f"--checkpoint={whole}", "--which=latest"]
    with Two(None, None, command=command) as two:
        (status, output, errors), (other, nothing, _) = two.ends()
    assert (status, other, nothing) == (0, 0, ""), errors
    last = read_metrics(whole / "metrics.jsonl")[-1]
    expected = "top-1 {val_top1:.3f}  top-5 {val_top5:.3f}  loss {val_loss:.3f}  images 360".format(**last)
    assert output.splitlines()[-1] == expected
    gathered = [line for line in errors.splitlines() if "Compiling" in line and "_identity_fn" in line]
    assert gathered  # JAX's all-gather of arrays that each process has: of sentences,
    assert not any("float32" in line for line in gathered)


@pytest.mark.parametrize(
    ("flag", "sentence"),
    [
        ("--checkpoint=nowhere", "there is no file or directory nowhere"),
        ("--mask=position_embedding", "the digest of the weights is "),
    ],
)
def test_two_that_would_evaluate_different_weights_are_told(whole, flag, sentence):
    command = ["-m", "convit_jax.evaluate", f"--checkpoint={whole}"]
    with Two(None, None, command=command, per_process=([], [flag])) as two:
        (status, _, errors), (other, _, silence) = two.ends()
    assert (status, other, silence) == (1, 1, "")
    assert errors.startswith(f"evaluate: process 1 of 2: {sentence}"), errors


def test_a_process_that_waits_in_vain_says_so_and_has_asked_nobody_for_what_the_flags_say():
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
    assert "visible devices" not in done.stderr  # else Slurm's SLURM_LOCALID, one GPU of eight
    assert "... joining the 2 processes at 127.0.0.1:" in done.stdout
    assert "the other processes were not there after 1 s: start all of them" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("coordinator", "processes", "process", "sentence"),
    [
        ("node1", 2, 0, "--coordinator is 'node1': give HOST:PORT of process 0"),
        ("node1:99999", 2, 0, "--coordinator is 'node1:99999': give HOST:PORT"),
        ("localhost:1234", 2, 2, "--process_id is 2 and --num_processes 2: ids count from 0"),
        ("localhost:1234", 0, 0, "--process_id is 0 and --num_processes 0"),
        ("no host:1234", 2, 1, "--coordinator names 'no host', which is no known host"),
        (
            "localhost:1234",
            None,
            0,
            "--num_processes is missing: --coordinator=HOST:PORT",
        ),
        (None, None, 0, "--coordinator is missing"),
    ],
)
def test_flags_that_do_not_fit_together(coordinator, processes, process, sentence):
    with pytest.raises(UserError, match=sentence):
        join(coordinator, processes, process)


def test_a_port_that_another_program_has():
    with socket.socket(socket.AF_INET6) as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} of --coordinator cannot be had"):
            join(f"localhost:{port}", 2, 0)


def test_who_started_several_processes():
    slurm = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_LOCALID": "0", "SLURM_PROCID": "1"}
    mpi = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
    assert cluster({}) is None
    assert cluster({**slurm, "SLURM_NTASKS": "2"}) == ("Slurm", 1)
    assert cluster({**slurm, "SLURM_NTASKS": "1"}) is None
    assert cluster({**mpi, "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"}) == ("Open MPI", 1)
    with pytest.raises(UserError, match="Open MPI 5 tells nobody where process 0 is: add --coordinator"):
        cluster(mpi)
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"}
    assert cluster(pod) == ("Kubernetes", 3)
