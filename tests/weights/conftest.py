"""How every broken or hostile file is tried."""

import os
import sys
import time

import numpy as np
import pytest

from convit_jax.errors import UserError
from convit_jax.weights import reader


@pytest.fixture
def read_state_dict():
    """A function: {name: array} of a file."""

    def read(path, places=None):
        return {name: np.asarray(tensor) for name, tensor in reader.open_state_dict(path, places).items()}

    return read


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """A function: these bytes, as a file, are refused soon with one sentence; nothing is run or written."""
    monkeypatch.chdir(tmp_path)

    def check(data, match, name="weights.pth"):
        (tmp_path / name).write_bytes(data)
        modules, start = {*sys.modules}, time.monotonic()
        with pytest.raises(UserError, match=match) as caught:
            reader.read(tmp_path / name)
        sentence = str(caught.value)
        assert time.monotonic() - start < 20
        assert sentence.startswith(f"cannot read {tmp_path / name}")
        assert sentence.endswith(".")
        assert sentence.isprintable()
        assert len(sentence) < 400 + len(str(tmp_path))
        assert not {*sys.modules} - modules
        assert os.listdir(tmp_path) == [name]
        os.unlink(name)

    return check
