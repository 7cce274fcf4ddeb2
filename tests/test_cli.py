"""Commands report mistakes in their flags in one sentence, and end cleanly."""

import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, run_python, says

from convit_jax import cli, config
from convit_jax.errors import UserError, out_of_memory

WEIGHTS = f"--checkpoint={ROOT}/tests/golden/convit_golden.pth"
DIGITS = "--config=configs/digits.py"


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("evaluate", "there are no weights: add --checkpoint=PATH"),
        (f"evaluate {WEIGHTS} --config.data.dir=x", "--config.data.dir changes a config: add --config=FILE"),
        (f"evaluate {WEIGHTS}", "this needs a config: add --config="),
        (f"evaluate {WEIGHTS} {DIGITS} --gpsa_layers=2", "--gpsa_layers needs --gates"),
        (f"evaluate {DIGITS} --batch_size=8", "there is no flag --batch_size, did you mean --config.batch_size?"),
        (f"evaluate {DIGITS} --config.epoch=8", "the config has no field 'epoch', did you mean 'epochs'"),
        (f"evaluate {WEIGHTS} photo.jpg", "expected only flags, such as --config.epochs=10, got photo.jpg"),
        (f"evaluate {WEIGHTS} --image_size=3x4x5", "image_size is '3x4x5': give a side"),
        (f"predict {WEIGHTS}", "give at least one IMAGE"),
        (f"predict {WEIGHTS} --checkpiont=x", "Unknown command line flag 'checkpiont'. Did you mean: checkpoint"),
        (f"export {WEIGHTS} --platforms=cpu,gpu x", "there is no platform 'gpu': choose from cpu"),
        (f"export {WEIGHTS}", "expected OUTPUT, got nothing"),
        ("train --config.batch_size=many", "flag --config.batch_size=many: invalid literal for int()"),
        ("train --config=configs/ablations.py:x", "there is no ablation 'x'"),
        ("train --epochs=3", "there is no flag --epochs, did you mean --config.epochs?"),
    ],
)
def test_wrong_flags(run_here, line, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        run_here(*line.split())


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("evaluate --checkpont=x", "Unknown command line flag 'checkpont'. Did you mean: checkpoint"),
        ("evaluate --config=own.py", "there is no config file 'own.py'. They are in a clone of"),
        ("visualize --init --output=o", "this needs a config: add --config="),
        ("visualize --init --config.seed=1", "--config.seed changes a config: add --config=FILE"),
    ],
)
def test_package_without_configs(run_here, monkeypatch, tmp_path, line, sentence):
    monkeypatch.setattr(config, "IN_CLONE", False)
    for module in (config, cli):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    with pytest.raises(UserError, match=re.escape(sentence)):
        run_here(*line.split())


def test_package_without_the_clone_draws_attention_maps(tmp_path):
    shutil.copytree(ROOT / "convit_jax", tmp_path / "convit_jax", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "convit_jax.visualize", WEIGHTS, "--output=maps"]
    for options, sentence in (
        ([f"--config={ROOT}/configs/convit_s.py"], "convit_s.py imports from configs/: run the command in a clone"),
        ([f"--image={ROOT}/docs/digits.png"], ""),
    ):
        done = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, timeout=100)
        assert done.returncode == bool(sentence), done.stderr
        assert sentence in done.stderr
        assert "Traceback" not in done.stderr
    assert list((tmp_path / "maps").glob("*.png"))


def test_help_shows_the_flags_of_a_command():
    done = run_python("-m", "convit_jax.evaluate", "--help")
    for flag in ("--checkpoint:", "--config:", "--which:", "--heads:"):
        assert flag in done.stdout


def test_a_mistake_is_one_sentence(tmp_path):
    said = says("train.py", "--config.data.name=digit", f"--workdir={tmp_path}")
    assert said.startswith("train.py: cannot open the TFDS data set 'digit' (")


def test_device_out_of_memory():
    code = """if True:
        import jax
        from convit_jax.cli import launch

        def main(arguments):
            print("cat-\\udce9.jpg")  # a name in Latin-1, as os.fsdecode gives it
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory: 9 GiB.\\nA long list")

        launch("fake", main)
    """
    said = says("-c", code)
    assert said.startswith("fake: the device ran out of memory (RESOURCE_EXHAUSTED: Out of memory: 9 GiB.)")
    assert "A long list" not in said
    assert out_of_memory(RuntimeError("INTERNAL: a bug")) is None


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
