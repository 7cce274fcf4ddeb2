"""Commands report mistakes in their flags in one sentence."""

import shutil
import subprocess
import sys

import jax
import pytest
from conftest import ROOT, run_python, says

from convit_jax.errors import out_of_memory

WEIGHTS = f"--checkpoint={ROOT}/tests/golden/convit_golden.pth"


@pytest.mark.parametrize(
    ("command", "arguments", "sentence"),
    [
        ("evaluate", [], "there are no weights: add --checkpoint=PATH"),
        (
            "evaluate",
            [WEIGHTS, "--config.data.dir=x"],
            "--config.data.dir changes a config: add --config=FILE",
        ),
        ("evaluate", [WEIGHTS], "{weights} is not a run directory, so its images are unknown: add"),
        (
            "evaluate",
            ["--batch_size=8", "--config=configs/digits.py"],
            "there is no flag --batch_size, did you",
        ),
        ("evaluate", [WEIGHTS, "--config=configs/digits.py", "--config.epoch=8"], "the config has no field"),
        ("evaluate", [WEIGHTS, "photo.jpg"], "unexpected argument 'photo.jpg'"),
        ("predict", [WEIGHTS], "give at least one IMAGE"),
        (
            "predict",
            [WEIGHTS, "--checkpiont=x"],
            "Unknown command line flag 'checkpiont'. Did you mean: checkpoint",
        ),
        (
            "export",
            [WEIGHTS, "--platforms=cpu,gpu", "x"],
            "there is no platform 'gpu': choose from cpu",
        ),
        ("export", [WEIGHTS], "give one OUTPUT, not 0 arguments"),
    ],
)
def test_wrong_flags(command, arguments, sentence):
    expected = sentence.format(weights=WEIGHTS.removeprefix("--checkpoint="))
    assert says("-m", f"convit_jax.{command}", *arguments).startswith(f"{command}: {expected}")


def test_help_shows_the_flags_of_a_command():
    done = run_python("-m", "convit_jax.evaluate", "--help")
    for flag in ("--checkpoint:", "--config:", "--which:", "--heads:"):
        assert flag in done.stdout


def test_device_out_of_memory():
    code = """if True:
        import jax
        from convit_jax.cli import launch

        def main(arguments):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory: 9 GiB.\\nA long list")

        launch("fake", main)
    """
    said = says("-c", code)
    assert said.startswith("fake: the device ran out of memory (RESOURCE_EXHAUSTED: Out of memory: 9 GiB.)")
    assert "A long list" not in said
    assert out_of_memory(jax.errors.JaxRuntimeError("INTERNAL: a bug")) is None


@pytest.fixture
def alone(tmp_path):
    """Runs a command in a copy of the package without the rest of the clone."""
    without = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "convit_jax", tmp_path / "convit_jax", ignore=without)

    def run(command, *arguments):
        module = ["-m", f"convit_jax.{command}"]
        return subprocess.run(
            [sys.executable, *module, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=100
        )

    return run


@pytest.mark.parametrize(
    ("command", "arguments", "sentence"),
    [
        ("evaluate", ["--checkpont=x"], "Unknown command line flag 'checkpont'. Did you mean: checkpoint"),
        ("evaluate", ["--config=own.py"], "there is no config file 'own.py'. They are in a clone of"),
        (
            "evaluate",
            [f"--config={ROOT}/configs/convit_s.py"],
            "{root}/configs/convit_s.py imports from configs/: run the command in a clone",
        ),
        ("visualize", ["--init", "--output=o"], "this needs a config: add --config=FILE"),
        ("visualize", ["--init", "--config.seed=1"], "--config.seed changes a config: add --config=FILE"),
    ],
)
def test_package_without_configs(alone, command, arguments, sentence):
    done = alone(command, *arguments)
    assert done.returncode == 1
    expected = f"{command}: {sentence.format(root=ROOT)}"
    assert done.stderr.strip().splitlines()[-1].startswith(expected)
    assert "Traceback" not in done.stderr


def test_package_without_configs_draws_attention_maps(alone, tmp_path):
    image = f"--image={ROOT}/docs/digits.png"
    done = alone("visualize", WEIGHTS, image, "--output=maps")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "maps").glob("*.png"))


def test_ctrl_c_while_jax_compiles_ends_without_a_crash():
    """JAX's compiling thread outlives the interruption; an orderly end of Python would crash in it."""
    code = """if True:
        import os, signal, threading, time
        signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
        import jax
        from convit_jax.cli import launch

        def main(arguments):
            def sines(x):
                for number in range(300):
                    x = jax.numpy.sin(x @ x + number)
                return x

            x = jax.numpy.ones((8, 8))
            compiled = jax.jit(sines).lower(x)
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
            compiled.compile()
            time.sleep(60)  # a compilation that was faster

        launch("sines", main)
    """
    done = run_python("-c", code, timeout=100)
    assert (done.returncode, done.stderr) == (130, "sines: interrupted.\n")
