"""Indices: kept, found again, made anew when the data changed, and never half-written."""

import os
import pickle
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from convit_jax.data.index import Index, Names, cached_index, digest, make_index

LABELS, NAMES = [1, 0, 1, 0], ["b/10", "a/é", "b/1", "a/2"]
IN_ORDER = [("a/2", 0, 3), ("a/é", 0, 1), ("b/1", 1, 2), ("b/10", 1, 0)]  # name, label, record


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user's cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def build():
    return make_index(LABELS, NAMES, record=np.arange(4))


def never():
    pytest.fail("the index was built although it was there")


def rows(index):
    return list(zip(index.names, index["labels"].tolist(), index["record"].tolist(), strict=True))


@pytest.mark.parametrize("names", [[], [""], ["x"], ["a/1.jpg", "", "a/é😀.png", "z" * 300]])
def test_names_come_out_as_they_went_in(names):
    packed = Names(*Names.pack([name.encode() for name in names]))
    assert list(packed) == names
    assert len(packed) == len(names)
    if names:
        assert packed[-1] == names[-1]
    with pytest.raises(IndexError):
        packed[len(names)]


def test_records_are_put_in_the_order_of_label_and_name():
    assert rows(build()) == IN_ORDER


def test_a_digest_tells_apart_sources_with_as_many_images():
    def of(labels, names, classes=("a", "b")):
        index = make_index(labels, names)
        return digest(SimpleNamespace(labels=index["labels"], names=index.names, class_names=classes))

    this = of(LABELS, NAMES)
    assert this == of(LABELS[::-1], NAMES[::-1])
    others = of([0, 1, 0, 1], NAMES), of(LABELS, ["b/10", "a/e", "b/1", "a/2"]), of(LABELS, NAMES, ("b", "a"))
    assert len({this, *others}) == 4


def test_an_index_is_built_once_and_then_mapped_from_its_file(home):
    for make in (build, never):
        index = cached_index(home, "train", "f", make)
        assert rows(index) == IN_ORDER
        assert index.path == home / ".convit_jax-train.index"
    assert not isinstance(index["labels"], np.memmap)
    assert not index["labels"].flags.owndata
    assert sorted(path.name for path in home.iterdir()) == [".convit_jax-train.index"]


def test_an_index_on_the_disk_pickles_as_its_path_and_one_in_memory_as_its_arrays(home):
    kept = cached_index(home, "train", "f", lambda: make_index([0] * 5000, [f"{n:09d}" for n in range(5000)]))
    assert len(pickle.dumps(kept)) < 500
    for index in (cached_index(home, "train", "g", build), build()):
        assert rows(pickle.loads(pickle.dumps(index))) == IN_ORDER


@pytest.mark.parametrize("path", [".convit_jax-train.index", "cache/convit_jax/indices"])
def test_changed_data_make_the_index_anew(path, home):
    data = home / "data"
    data.mkdir()
    cached_index(data, "train", "before", lambda: make_index([0], ["old"], record=np.arange(1)))
    assert rows(cached_index(data, "train", "after", build)) == IN_ORDER
    assert rows(cached_index(data, "train", "after", never)) == IN_ORDER


def test_what_is_not_worth_a_file_gets_none(home):
    for _ in range(2):
        assert rows(cached_index(home, "train", "f", build, keep=lambda index: False)) == IN_ORDER
    assert not list(home.iterdir())


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]\n", b'{"magic": "x"}\n', b"\xff\xfe\n", None])
def test_a_damaged_file_is_made_anew(damage, home):
    path = cached_index(home, "train", "f", build).path
    path.write_bytes(path.read_bytes()[:-3] if damage is None else damage)
    assert rows(cached_index(home, "train", "f", build)) == IN_ORDER
    assert rows(cached_index(home, "train", "f", never)) == IN_ORDER


def read_only(home, monkeypatch, *names):
    """Make folders unwritable, for root as well."""

    def refuse(path, *arguments, **settings):
        if any(str(settings.get("dir", path)).startswith(str(home / name)) for name in names):
            raise PermissionError(13, "Permission denied")
        return original(path, *arguments, **settings) if path else original(*arguments, **settings)

    import tempfile

    original = tempfile.mkstemp
    monkeypatch.setattr(tempfile, "mkstemp", lambda **settings: refuse("", **settings))


def test_beside_read_only_data_the_users_cache_folder_serves_one_index_per_directory(home, monkeypatch):
    read_only(home, monkeypatch, "one", "two")
    for name in ("one", "two"):
        (home / name).mkdir()
        index = cached_index(home / name, "train", "f", build)
        assert index.path.parent == home / "cache/convit_jax/indices"
        assert rows(cached_index(home / name, "train", "f", never)) == IN_ORDER
    assert len(list((home / "cache/convit_jax/indices").iterdir())) == 2


def test_where_nothing_can_be_written_the_index_stays_in_memory(home, monkeypatch):
    read_only(home, monkeypatch, "data", "cache")
    (home / "data").mkdir()
    index = cached_index(home / "data", "train", "f", build)
    assert index.path is None
    assert rows(index) == IN_ORDER
    assert not [path for path in home.rglob("*") if path.is_file()]


def test_a_write_that_is_cut_off_leaves_no_index(home):
    """A process that is killed in the middle of writing; the next one starts from nothing."""
    program = f"""
import os, signal
import numpy as np
from convit_jax.data import index
os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
index.cached_index({str(home)!r}, "train", "f", lambda: index.make_index([0], ["a"], record=np.arange(1)))
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL
    assert [path.name for path in home.iterdir() if path.suffix == ".unfinished"]
    assert rows(cached_index(home, "train", "f", build)) == IN_ORDER


def test_a_full_disk_leaves_nothing_behind(home, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    index = cached_index(home, "train", "f", build)
    assert rows(index) == IN_ORDER
    assert isinstance(index, Index)
    assert not [path for path in home.rglob("*") if path.is_file()]
