"""Eight simulated devices for every test, tiny configs, and a way to run train.py as a user does."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Level 0 halves the time that compilation takes, the older code generator for fusions halves it again (it
# may round a product and a sum once); XLA's own passes, which decide the arithmetic, still run. The run that
# training/test_resume.py kills is compiled as a user's.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES"] = "none"  # they would put the folder into each key

import contextlib
import runpy
import shutil
import signal
import site
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags

from convit_jax import cli
from convit_jax.rundir import checkpoint_steps

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background jobs that ignore it

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests/golden"
TINY = {"batch_size": 80, "mesh.data": 1, "optim.warmup_epochs": 0.0}
TINY |= {"model.embed_dim": 16, "model.num_heads": 4, "model.depth": 3, "model.local_up_to_layer": 2}
SPEEDS = ("images_per_second", "data_wait", "mfu")  # fields of metrics.jsonl that depend on the clock
QUICK = os.environ["XLA_FLAGS"]  # for processes that tests start; here there are eight devices beside it
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"
flags.FLAGS.mark_as_parsed()  # Grain's worker processes ask for it
jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory):
    """A home directory of the session: nothing is written into the user's.

    All workers, and the processes that tests start, keep compiled programs where configs have them.
    """
    session = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        session = session.parent
    kept = Path("~/.cache/matplotlib").expanduser()  # its list of fonts takes seconds to make
    os.environ |= {"MPLCONFIGDIR": str(kept), "PYTHONUSERBASE": site.getuserbase()}
    os.environ["HOME"] = str(session / "home")
    os.environ.pop("XDG_CACHE_HOME", None)
    compiled = session / "home/.cache/convit_jax/compiled"
    if kept := os.environ.get("JAX_COMPILATION_CACHE_DIR"):  # keeps compiled programs between test runs
        for folder in (Path(kept), compiled.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            compiled.symlink_to(Path(kept).absolute())
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(compiled)
    jax.config.update("jax_compilation_cache_dir", str(compiled))


@pytest.fixture
def xla_for_cudnn(monkeypatch):
    """Layers take the way around cuDNN's attention, as on a GPU that has it, and XLA computes it."""
    from convit_jax.models import kernels

    monkeypatch.setattr(kernels, "cudnn_available", lambda: True)
    monkeypatch.setattr(kernels.CudnnBackend, "implementation", "xla")


@pytest.fixture
def digits_config():
    """configs/digits.py with TINY, a model so small that a step takes milliseconds: 18 steps an epoch."""
    from configs import digits

    config = digits.get_config()
    fields = {"epochs": 2, "steps": 12, "model.drop_path_rate": 0.0, "log_every": 4, "checkpoint_every": 5}
    config.update_from_flattened_dict(TINY | fields)
    return config


@pytest.fixture
def train_once(tmp_path_factory):
    """A function: the directory of the run of a name, trained with a config by the first who asks for it."""
    from convit_jax.training.loop import train

    def run_directory(name, config):
        workdir = tmp_path_factory.getbasetemp() / name
        if not workdir.exists():
            train(config, workdir)
        return workdir

    return run_directory


@pytest.fixture
def trained(digits_config, train_once, tmp_path):
    """tmp_path/run, the directory of a training with digits_config, of which every test has its own copy."""
    return Path(shutil.copytree(train_once("trained", digits_config), tmp_path / "run"))


@pytest.fixture
def image_folder(tmp_path):
    """A real image folder: 3 classes of 6 training and 2 validation JPEGs, 20 x 24 pixels."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for label, name in enumerate(("ant", "bee", "cat")):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(80 * label, 80 * label + 90, (20, 24, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{index}.jpg")
    return tmp_path / "images"


@pytest.fixture
def tfds_data(tmp_path):
    """A fresh copy of tests/golden/tfds.tar.gz: array_record/ and tfrecord/, each a TFDS data directory."""
    with tarfile.open(GOLDEN / "tfds.tar.gz") as archive:
        archive.extractall(tmp_path / "tfds", filter="data")
    return tmp_path / "tfds"


@pytest.fixture(scope="session")
def golden():
    """The authors' small network with its weights."""
    from convit_jax.weights import pretrained

    return pretrained.load(GOLDEN / "convit_golden.safetensors")


@pytest.fixture(scope="session")
def original():
    """What the authors' code computed from that network, by name, and "images" [3, 48, 48, 3]."""
    with np.load(GOLDEN / "convit_golden_io.npz") as file:
        return {**file, "images": file["images_nchw"].transpose(0, 2, 3, 1)}


@pytest.fixture
def run_here(monkeypatch, capsys):
    """A function: runs a command such as "predict" in this process; returns a CompletedProcess."""
    monkeypatch.chdir(ROOT)
    status = []

    def launch(name, main, *, define=lambda: None, config=None, arguments="", **others):
        status.append(main(cli._parse(sys.argv, [define], config, arguments)[1:]))

    def run(command, *arguments):
        monkeypatch.setattr(cli, "launch", launch)
        monkeypatch.setattr(sys, "argv", ["", *map(str, arguments)])
        runpy.run_path("train.py" if command == "train" else f"convit_jax/{command}.py", run_name="__main__")
        return subprocess.CompletedProcess(arguments, status[-1], *capsys.readouterr())

    return run


def saved(workdir, step=None):
    """The tree of arrays in a run's checkpoint of a step, by default the latest, on one device."""
    from orbax.checkpoint import v1 as ocp

    step = max(checkpoint_steps(workdir)) if step is None else step
    path = (workdir / "checkpoints" / str(step)).absolute()
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), ocp.metadata(path).metadata
    )
    return ocp.load(path, wanted)


def assert_same(one, other, **tolerance):
    """Two trees of arrays are equal, bit for bit unless a tolerance is given."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        if tolerance:
            np.testing.assert_allclose(a, b, **tolerance)
        else:
            np.testing.assert_array_equal(a, b)


def collect(example, **settings):
    """The batches of an example, as copies in plain arrays: a loader worker reuses their memory."""
    from convit_jax.data.loader import batches

    return [{k: np.array(v) for k, v in batch.items()} for batch in batches(example, **settings)]


def names(source):
    """The names of all images of a source."""
    return [source.name(number) for number in range(len(source.labels))]


def python_call(*arguments, xla_flags=QUICK, cwd=ROOT, **environment):
    """How subprocess starts Python: by default in the clone and on one device; warnings as errors, text output."""
    warnings = ["-W", "error", "-W", "ignore:the load_module"]  # ml_collections on Python 3.11
    command = [sys.executable, *warnings, *map(str, arguments)]
    environment = {**os.environ, "XLA_FLAGS": xla_flags, "PYTHONUNBUFFERED": "1", **environment}
    return dict(args=command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_python(*arguments, timeout=None, **how):
    """Runs Python as python_call says: a CompletedProcess."""
    return subprocess.run(**python_call(*arguments, **how), timeout=timeout)


@contextlib.contextmanager
def python_process(*arguments, **how):
    """Python that runs as python_call says: a Popen, which is killed at the end of the context."""
    with subprocess.Popen(**python_call(*arguments, **how)) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_until(condition, *processes, seconds=300):
    """Waits until a condition holds, which processes bring about."""
    deadline = time.monotonic() + seconds
    while not condition():
        ended = [process.communicate() for process in processes if process.poll() is not None]
        assert not ended, ended
        assert time.monotonic() < deadline
        time.sleep(0.01)


def says(*arguments):
    """What a command (run_python) prints to the error stream when it refuses; never a trace."""
    done = run_python(*arguments, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]
