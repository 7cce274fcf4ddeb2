"""More shards than a process may have open, in a process of its own whose limits are low."""

import resource
import subprocess
import sys

import pytest
from conftest import ROOT

LIMITED = """
import resource, sys
from convit_jax.data import open_files
from convit_jax.errors import UserError
resource.setrlimit(resource.RLIMIT_NOFILE, (1024, int(sys.argv[1])))
try:
    for needed in (1280, 1280, 100):
        open_files.allow(needed, "a data set", " or more")
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (1280, int(sys.argv[1]))
except UserError as error:
    print(error)
files = [open("/dev/null") for _ in range(1100)]
"""


@pytest.mark.parametrize("hard", [4096, 1024])
def test_the_soft_limit_is_raised_or_the_hard_one_said(hard):
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] >= 4096
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(hard)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if hard == 4096:
        assert done.returncode == 0, done.stderr
    else:
        assert "a data set needs 1,280 open files, but a process may have 1,024 here" in done.stdout
        assert "(ulimit -Hn): have that limit raised or more." in done.stdout
        assert "Too many open files" in done.stderr
