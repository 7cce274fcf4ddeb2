"""Mutated checkpoints end in values or in a sentence: a few hundred of them; by hand, thousands."""

import subprocess
import sys

from conftest import ROOT


def test_mutated_files_give_values_or_a_sentence(tmp_path):
    command = [sys.executable, str(ROOT / "tests/weights/fuzz.py"), "--files=400"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("400 files: ")
    assert "(0 for want of memory, 0 unprintable)" in done.stdout
