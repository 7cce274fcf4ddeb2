"""Indices on disk: kept, found, replaced when the data changed, never half-written."""

import os
import pickle

import numpy as np
import pytest

from convit_jax.data.index import cached_index, make_index

IN_ORDER = [("a/2", 0, 3), ("a/é", 0, 1), ("b/1", 1, 2), ("b/10", 1, 0)]  # name, label, record


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Contains the data, and the user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def data(home):
    (home / "data").mkdir()
    return home / "data"


def build():
    return make_index([1, 0, 1, 0], ["b/10", "a/é", "b/1", "a/2"], record=np.arange(4))


def never():
    pytest.fail("the index was built although it was kept")


def rows(index):
    columns = [index.table[name].tolist() for name in ("names", "labels", "record")]
    return [(name.decode(), label, record) for name, label, record in zip(*columns, strict=True)]


def test_an_index_is_built_once_then_mapped_and_pickles_as_its_path(data):
    for make in (build, never):
        index = cached_index(data, "train", "f", make)
        assert rows(index) == IN_ORDER
        assert index.path.parent == data
    assert type(index.table) is np.ndarray
    assert not index.table.flags.owndata
    assert os.listdir(data) == [index.path.name]
    assert index.path.stat().st_mode & 0o777 == data.stat().st_mode & 0o666  # as the umask gives
    large = cached_index(data, "large", "f", lambda: make_index([0] * 5000, [f"{n:09d}" for n in range(5000)]))
    assert len(pickle.dumps(large)) < 500
    for kept in (index, build()):
        assert rows(pickle.loads(pickle.dumps(kept))) == IN_ORDER
    for make in (lambda: make_index([], []), never):
        assert cached_index(data, "empty", "f", make).table.shape == (0,)


@pytest.mark.parametrize("with_the_data", [True, False])
def test_changed_data_have_another_index_than_that_of_a_run(with_the_data, home):
    for data in (home / "one", home / "two"):
        data.mkdir() if with_the_data else data.touch()  # nothing can be written into a file
        old = cached_index(data, "train", "before", lambda: make_index([0], ["old"], record=np.arange(1)))
        index = cached_index(data, "train", "after", build)
        assert rows(index) == rows(cached_index(data, "train", "after", never)) == IN_ORDER
        assert rows(pickle.loads(pickle.dumps(old))) == [("old", 0, 0)]  # as a run's next workers do
        assert index.path.parent == (data if with_the_data else home / "cache/convit_jax/indices")
    assert len(os.listdir(index.path.parent)) == (2 if with_the_data else 4)


def test_a_damaged_index_is_replaced(data):
    path = cached_index(data, "train", "f", build).path
    whole = path.read_bytes()
    header = [whole.replace(b"labels", name) for name in (b"others", b"l\0b(ls")]
    for damaged in (b"", b"text", whole[:50], whole[:-3], *header):
        path.write_bytes(damaged)
        for make in (build, never):
            assert rows(cached_index(data, "train", "f", make)) == IN_ORDER


def test_the_index_that_another_process_finished_first_is_used(data):
    others = []
    index = cached_index(
        data, "train", "f", lambda: others.append(cached_index(data, "train", "f", build).path.stat().st_ino) or build()
    )
    assert rows(index) == IN_ORDER
    assert others == [index.path.stat().st_ino]  # the same file


def test_an_index_that_cannot_be_written_stays_in_memory(home, data, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    index = cached_index(data, "train", "f", build)
    assert index.path is None
    assert rows(index) == IN_ORDER
    assert not [path for path in home.rglob("*") if path.is_file()]
