"""What the commands say of mistakes in their flags."""

import pytest
from conftest import ROOT, run_python, says

WEIGHTS = f"--checkpoint={ROOT}/tests/golden/convit_golden.pth"


@pytest.mark.parametrize(
    ("command", "arguments", "sentence"),
    [
        ("evaluate", [], "say with --checkpoint=PATH which weights to take"),
        (
            "evaluate",
            [WEIGHTS, "--config.data.dir=x"],
            "--config.data.dir changes a config: add --config=FILE",
        ),
        ("evaluate", [WEIGHTS], "{weights} is no run directory and says nothing of images: add --config="),
        ("evaluate", [WEIGHTS, "photo.jpg"], "unexpected argument 'photo.jpg'"),
        ("predict", [WEIGHTS], "give at least one IMAGE"),
        (
            "predict",
            [WEIGHTS, "--checkpiont=x"],
            "Unknown command line flag 'checkpiont'. Did you mean: checkpoint",
        ),
        ("export", [WEIGHTS, "--platforms=cpu,gpu", "x"], "there is no platform 'gpu': choose of cpu, cuda"),
        ("export", [WEIGHTS], "give one OUTPUT, not 0 arguments"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(command, arguments, sentence):
    expected = sentence.format(weights=WEIGHTS.removeprefix("--checkpoint="))
    assert says("-m", f"convit_jax.{command}", *arguments).startswith(f"{command}: {expected}")


def test_help_shows_the_flags_of_a_command():
    done = run_python("-m", "convit_jax.evaluate", "--help")
    for flag in ("--checkpoint:", "--config:", "--which:", "--heads:"):
        assert flag in done.stdout


def test_ctrl_c_while_jax_compiles_ends_without_a_crash():
    """JAX's compiling thread outlives the interruption; an orderly end of Python would crash in it."""
    code = """if True:
        import os, signal, threading, time
        signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
        import jax
        from convit_jax.commands import launch

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
