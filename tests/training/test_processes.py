"""Real processes over loopback, two devices each: one training, whatever happens to one of them."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT, assert_same, saved

from convit_jax.training.loop import train
from convit_jax.training.metrics import read_metrics
from convit_jax.training.rundir import flatten

STEPS = 40  # enough for a signal to come in the middle


def free_port():
    """A port that nobody has: the system gives it once, and not again soon."""
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return trial.getsockname()[1]


class Two:
    """Two processes of train.py with two devices each, in a `with` that ends both."""

    def __init__(self, config, workdir, *flags, slurm=False, environment=None):
        port = free_port()
        fields = {n: v for n, v in flatten(config).items() if v is not None and not isinstance(v, list)}
        settings = [f"--config.{name}={value}" for name, value in fields.items()]
        warnings = ["-W", "error", "-W", "ignore:the load_module"]  # ml_collections on Python 3.11
        command = [sys.executable, *warnings, "train.py", f"--workdir={workdir}", *settings, *flags]
        self.processes, self.workdir = [], workdir
        for index in range(2):
            xla = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
            ours = {**os.environ, "XLA_FLAGS": xla, "PYTHONUNBUFFERED": "1", **(environment or {})}
            which = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={index}"]
            if slurm:  # what srun sets, and JAX reads
                which = []
                ours |= {"SLURM_JOB_ID": "4711", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
                ours |= {"SLURM_PROCID": f"{index}", "SLURM_LOCALID": f"{index}"}
                ours |= {"SLURM_STEP_NUM_NODES": "1", "JAX_COORDINATOR_PORT": f"{port}"}
            self.processes.append(
                subprocess.Popen(
                    [*command, *which],
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
            time.sleep(0.005)

    def ends(self, which=(0, 1)):
        """[(exit status, output, errors)] of the processes, without what Gloo says of itself."""
        ended = []
        for process in (self.processes[index] for index in which):
            output, errors = process.communicate(timeout=300)
            lines = [line for line in output.splitlines(True) if not line.startswith("[Gloo]")]
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


def test_a_signal_to_one_of_two_saves_together_and_one_process_continues(config, tmp_path):
    with Two(config, tmp_path / "parts", slurm=True) as two:
        two.wait_for_step(4)
        two.processes[1].send_signal(signal.SIGTERM)
        (status, output, errors), other = two.ends()
    assert (status, errors) == (0, ""), errors
    assert other == (0, "", "")  # process 1 writes nothing
    assert "... joining the processes that Slurm has started" in output
    assert "2 processes with 2 devices each, 4 in all" in output
    assert "All-reduce of 4 MiB" in output
    assert "Stopped by SIGTERM at step" in output
    step = int(saved(tmp_path / "parts")["state"]["step"])
    assert 4 < step < STEPS
    assert read_metrics(tmp_path / "parts/metrics.jsonl")[-1]["step"] == step

    config.steps = step
    train(config, tmp_path / "one")
    by_two = saved(tmp_path / "parts")["state"]
    assert_same(saved(tmp_path / "one")["state"], by_two, atol=2e-5, rtol=1e-4)
    config.steps = STEPS
    train(config, tmp_path / "one")
    train(config, tmp_path / "parts")
    one, parts = saved(tmp_path / "one"), saved(tmp_path / "parts")
    assert_same(one["state"]["params"], parts["state"]["params"], atol=2e-5)


def test_two_continue_what_one_began_and_a_killed_one_ends_the_other_and_a_restart_is_exact(config, tmp_path):
    config.steps = 4
    train(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    config.steps = STEPS
    with Two(config, tmp_path / "whole") as two:
        (status, output, errors), other = two.ends()
    assert (status, errors) == (0, ""), errors
    assert "Continuing at step 4" in output
    assert other == (0, "", "")

    with Two(config, tmp_path / "killed", "--heartbeat_timeout=5") as two:
        two.wait_for_step(12)
        two.processes[1].kill()
        began = time.monotonic()
        ((status, _, errors),) = two.ends([0])
    assert time.monotonic() - began < 30
    assert status != 0
    said = errors.strip().splitlines()[-1]
    assert said.startswith("train.py: process 0 of 2"), errors
    with Two(config, tmp_path / "killed") as two:
        assert [status for status, _, _ in two.ends()] == [0, 0]
    assert_same(saved(tmp_path / "whole"), saved(tmp_path / "killed"))

    train(config, tmp_path / "one")
    one, two = saved(tmp_path / "one"), saved(tmp_path / "whole")
    assert_same(one["state"]["params"], two["state"]["params"], atol=2e-5)
