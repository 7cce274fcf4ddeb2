"""Mutated checkpoints end in values or in a message: a few hundred of them here, thousands by hand."""

import subprocess
import sys

from conftest import ROOT


def test_mutated_files_give_values_or_a_message(tmp_path):
    command = [sys.executable, str(ROOT / "tests/weights/fuzz.py"), "--files=300"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("300 files: ")
    assert "(0 for lack of memory, 0 unprintable), 0 modules imported" in done.stdout
