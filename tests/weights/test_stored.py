"""Tensors that stay in their file until they are taken."""

import os

import jax
import numpy as np
import pytest
from conftest import ROOT, assert_same

from convit_jax.errors import UserError
from convit_jax.weights import names, pretrained, reader, stored, writer
from convit_jax.weights.formats import save
from convit_jax.weights.stored import Stored

GOLDEN = ROOT / "tests/golden"


@pytest.fixture
def small_pieces(monkeypatch):
    """Every matrix of the small networks is read in several pieces."""
    monkeypatch.setattr(stored, "PIECE", 500)


def read_at_once(path):
    """{name: array} of a file, without tensors that stay in it."""
    with reader.opened(path) as (_, tree, plain):
        return reader.without_prefixes(plain.value(reader.find_state_dict(tree)))


@pytest.mark.parametrize("name", ["convit_golden.pth", "convit_golden.safetensors", "kinds_zip.pth"])
def test_the_numbers_are_those_that_are_read_at_once(small_pieces, name):
    tensors = reader.open_state_dict(GOLDEN / name)
    expected = read_at_once(GOLDEN / name)
    assert list(tensors) == list(expected)
    assert any(isinstance(tensor, Stored) for tensor in tensors.values())
    for tensor, array in zip(tensors.values(), expected.values(), strict=True):
        assert (tensor.shape, tensor.dtype, tensor.size) == (array.shape, array.dtype, array.size)
        np.testing.assert_array_equal(np.asarray(tensor), array)
        if isinstance(tensor, Stored):
            rows = [(first, rows.copy()) for first, rows in tensor.rows()]
            assert [first for first, _ in rows] == [*range(0, len(tensor), len(rows[0][1]))]
            np.testing.assert_array_equal(np.concatenate([each for _, each in rows]), array)
            with pytest.raises(ValueError, match="without a copy"):
                np.asarray(tensor, copy=False)


@pytest.mark.parametrize("name", ["big_endian.pth", "kinds_zip.pth"])
def test_what_does_not_lie_there_as_it_is_is_an_array(name):
    found = reader.open_state_dict(GOLDEN / name, places=["views"] if name == "kinds_zip.pth" else None)
    assert all(isinstance(tensor, np.ndarray) for tensor in found.values())


def test_parameters_straight_from_the_file(small_pieces):
    loaded = pretrained.load(GOLDEN / "convit_golden.pth")
    assert all(isinstance(tensor, Stored) for tensor in loaded.tensors.values())
    arrays = read_at_once(GOLDEN / "convit_golden.pth")
    assert_same(loaded.params(), names.to_params(arrays, loaded.network[1]))
    assert jax.tree.leaves(loaded.params())[0].dtype == np.float32


@pytest.mark.parametrize("target", ["w", "w.pth", "w.safetensors"])
def test_a_damaged_number_is_found_when_it_is_taken(read_state_dict, tmp_path, small_pieces, target):
    data = bytearray((GOLDEN / "convit_golden.pth").read_bytes())
    at = data.index(read_state_dict(GOLDEN / "convit_golden.pth")["head.weight"].tobytes())
    data[at + 1000] ^= 1
    (tmp_path / "damaged.pth").write_bytes(data)
    loaded = pretrained.load(tmp_path / "damaged.pth")
    sentence = f"cannot read {tmp_path}/damaged.pth: it is damaged .wrong checksum of bytes"
    with pytest.raises(UserError, match=sentence):
        loaded.params()
    with pytest.raises(UserError, match=sentence):
        save(loaded, tmp_path / target) if target == "w" else writer.write(tmp_path / target, loaded.tensors)
    assert os.listdir(tmp_path) == ["damaged.pth"]


def test_the_file_may_be_replaced_meanwhile_and_is_cut_off_with_a_sentence(tmp_path):
    path = tmp_path / "a.pth"
    writer.write(path, {"a": np.arange(6.0).reshape(2, 3)})
    tensors = reader.open_state_dict(path)
    writer.write(path, {"a": np.zeros((2, 3))})
    np.testing.assert_array_equal(np.asarray(tensors["a"]), np.arange(6.0).reshape(2, 3))
    assert np.asarray(tensors["a"], np.float32).dtype == np.float32
    tensors = reader.open_state_dict(path)
    os.truncate(path, 100)
    with pytest.raises(UserError, match=r"a.pth: it ends .* bytes too early"):
        np.asarray(tensors["a"])


def test_the_file_is_closed_with_its_last_tensor():
    tensors = reader.open_state_dict(GOLDEN / "convit_golden.pth")
    descriptor = next(iter(tensors.values())).held.fileno()
    os.fstat(descriptor)
    del tensors
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
