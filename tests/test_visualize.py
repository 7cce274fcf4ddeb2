"""python -m convit_jax.visualize as a user starts it."""

import subprocess
import sys

from conftest import ROOT


def visualize(*arguments):
    command = [sys.executable, "-m", "convit_jax.visualize", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)


def test_augmentations_of_the_default_config_into_a_folder(tmp_path):
    done = visualize("--augmentations", f"--output={tmp_path}/pictures")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() == f"{tmp_path}/pictures/augmentations.png"
    assert (tmp_path / "pictures/augmentations.png").stat().st_size > 10_000


def test_what_is_missing_is_said_in_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    for arguments, sentence in (
        ((), "say what to draw: --augmentations."),
        (("--augmentations", f"--output={tmp_path}/file/x.png"), "cannot make the folder"),
    ):
        done = visualize(*arguments)
        assert done.returncode == 1
        assert done.stderr.startswith(f"visualize: {sentence}")
