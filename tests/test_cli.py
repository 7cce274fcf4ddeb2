"""Commands report mistakes in their flags in one sentence, and end cleanly."""

import re
import shutil
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT, run_python, says

from convit_jax.errors import UserError, known_cause

WEIGHTS = f"--checkpoint={ROOT}/tests/golden/convit_golden.pth"
DIGITS = "--config=configs/digits.py"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("evaluate", "there are no weights: add --checkpoint=PATH"),
        (f"evaluate {WEIGHTS} --config.data.dir=x", "--config.data.dir changes a config: add --config=FILE"),
        (f"evaluate {WEIGHTS}", "this needs a config: add --config="),
        (f"evaluate {WEIGHTS} {DIGITS} --gpsa_layers=2", "--gpsa_layers needs --gates"),
        (f"evaluate {DIGITS} --batch_size=8", "there is no flag --batch_size, did you mean --config.batch_size?"),
        (f"evaluate {WEIGHTS} photo.jpg", "expected only flags, such as --config.epochs=10, got photo.jpg"),
        (f"evaluate {WEIGHTS} --image_size=3x4x5", "image_size is '3x4x5': give a side"),
        (f"predict {WEIGHTS}", "give at least one IMAGE"),
        (f"predict {WEIGHTS} --checkpiont=x", "Unknown command line flag 'checkpiont'. Did you mean: checkpoint"),
        (f"export {WEIGHTS} --platforms=cpu,gpu x", "there is no platform 'gpu': choose from cpu"),
        (f"export {WEIGHTS}", "expected OUTPUT, got nothing"),
        (f"export {WEIGHTS} m.onnx", "export writes StableHLO, not .onnx: name it m.stablehlo."),
        ("train --config=configs/ablations.py:x", "there is no ablation 'x'"),
        ("train --epochs=3", "there is no flag --epochs, did you mean --config.epochs?"),
        ("train --config=configs/digit.py", "there is no file 'configs/digit.py', did you mean 'configs/digits.py'?"),
        ("train --config.optim.lrr=1", "no field 'optim.lrr', did you mean 'optim.lr'"),
        ("train --config.lr=1", "no field 'lr', did you mean 'optim.lr'"),
        ("train --config.epochs=ten", "config.epochs=ten: invalid literal for int"),
        ("visualize", "give --checkpoint=PATH and --image=IMAGE, or one of"),
        ("visualize --init --run=x --output=o", "give --checkpoint=PATH and --image=IMAGE, or one of"),
        ("visualize --init", "there is no place for the pictures: add --output=DIR."),
        (f"visualize {WEIGHTS} --output=o --image=1 --layers=0,5", "--layers is 0,5: give numbers from 1 to 4"),
        (f"visualize {WEIGHTS} --output=o --image=1 --query=9,0", "--query is 9,0: give ROW,COLUMN of a patch, 0,0 to"),
        (f"visualize {WEIGHTS} --output=o --image=nothing.jpg", "cannot read nothing.jpg"),
        (f"visualize {WEIGHTS} --output=o --image=3 --config.data.dir=x", ".pth is not a run directory: add --config"),
        (f"visualize {WEIGHTS} --output=o --image=360 {DIGITS}", "--image is 360, but the test split has images 0"),
        ("study/__main__ studies/digits.py", "say which study of the file, as FILE.py:NAME; it has models, sample_eff"),
        ("study/__main__ README.md", "cannot read the plan README.md ("),
        ("study/__main__ studies/digits.py:models --config.seed=1", "--config.seed is not possible here"),
    ],
)
def test_wrong_flags(run_here, line, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        run_here(*line.split())


def test_pyproject_lists_all_packages():
    listed = {*PROJECT["tool"]["setuptools"]["packages"]}
    packages = {".".join(path.parent.relative_to(ROOT).parts) for path in ROOT.glob("convit_jax/**/__init__.py")}
    recipes = {f"convit_jax.recipes{part}" for part in ("", ".configs", ".studies")}
    assert listed == packages | recipes


def test_installed_commands_run_in_any_directory(tmp_path):
    package, ignored = tmp_path / "site/convit_jax", shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "convit_jax", package, ignore=ignored)
    for folder in ("configs", "studies"):
        shutil.copytree(ROOT / folder, package / "recipes" / folder, ignore=ignored)
    shutil.copy(ROOT / "train.py", package / "recipes")

    def run(script, *arguments):
        code = f"import sys; sys.argv[0] = 'convit-{script}'; from convit_jax.cli import console; console()"
        return run_python("-c", code, *arguments, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"), timeout=300)

    for script in PROJECT["project"]["scripts"]:
        done = run(script.removeprefix("convit-"), "--help")
        assert (done.returncode, "--helpfull" in done.stdout) == (0, True), done.stderr
        if script not in ("convit-train", "convit-study"):
            assert {"--image_size:", "--heads:"} <= {*done.stdout.split()}
    listed = run("study", "digits:models", "--list")
    assert "recipes/train.py --config=configs/digits.py" in listed.stdout, listed.stderr
    refused = run("train", "--config=convit_x")
    assert refused.stderr.startswith("train.py: there is no file 'convit_x', did you mean 'convit_s'? The files are:")
    refused = run("train", "--config=ablations:e", "--config.data.name=digits", "--config.data.std=(1.0,1.0)")
    assert "data.std is (1.0, 1.0): give 3 numbers" in refused.stderr


def test_platform_that_jax_does_not_have(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert says("-m", "convit_jax.predict", WEIGHTS, "docs/attention.png").startswith(
        "predict: JAX cannot use JAX_PLATFORMS=cuda"
    )


def test_a_path_in_an_unknown_home_directory():
    with pytest.raises(RuntimeError) as raised:
        Path("~nobody-of-that-name/runs").expanduser()
    assert known_cause(raised.value).startswith("a path begins with ~, but the home directory is unknown")


def test_closed_error_stream():
    code = "import sys; sys.stderr = None; from convit_jax.cli import launch; launch('fake', lambda _: 3)"
    assert run_python("-c", code).returncode == 3


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
    assert known_cause(RuntimeError("INTERNAL: a bug")) is None


@pytest.mark.parametrize("line", ["compiles()", "Dropped()", "raise ImportError('of C++') from KeyboardInterrupt()"])
def test_ctrl_c_is_not_lost_where_other_code_catches_it_or_jax_compiles(line):
    code = f"""if True:
        import os, signal, threading, time
        import jax
        from convit_jax.cli import launch

        class Dropped:
            def __del__(self):
                raise KeyboardInterrupt

        def sines(x):
            for number in range(300):
                x = jax.numpy.sin(x @ x + number)
            return x

        def compiles():  # in a thread that outlives the interruption; an orderly end of Python would crash in it
            compiled = jax.jit(sines).lower(jax.numpy.ones((8, 8)))
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
            compiled.compile()

        def main(arguments):
            {line}
            time.sleep(60)  # also after a compilation that was faster

        launch("sleep", main)
    """
    done = run_python("-c", code, timeout=300)
    assert (done.returncode, done.stderr) == (130, "sleep: interrupted.\n")
