"""The line that stands in for TFDS's bars: in a terminal, in a file, and what it knows when TFDS stops."""

import io
from types import SimpleNamespace

import pytest

from convit_jax.data import tfds_progress
from convit_jax.data.tfds_progress import Progress


class Screen(io.StringIO):
    def __init__(self, live):
        super().__init__()
        self.live = live

    def isatty(self):
        return self.live


@pytest.fixture
def clocked(monkeypatch):
    """A clock that each look at it moves on by ten seconds."""
    seconds = iter(range(0, 100_000, 10))
    monkeypatch.setattr(tfds_progress, "time", SimpleNamespace(monotonic=lambda: next(seconds)))


TRAIN = [(f"{wnid}_{n}", {"label": wnid}) for wnid in ("a", "b") for n in range(4)]


def watch_all(progress):
    """What TFDS iterates over, in its order and with its words."""
    for split, items in (("train", TRAIN), ("validation", TRAIN[:5])):
        assert list(progress.watch(items, desc=f"Generating {split} examples...", unit="x")) == items
        assert list(progress.watch(items, desc="Shuffling /a/train.x...", total=len(items))) == items


def test_in_a_file_there_is_a_line_now_and_then_and_one_for_each_stage(clocked):
    progress = Progress({"a": 100, "b": 300}, 5, stream=Screen(live=False))
    watch_all(progress)
    lines = progress.stream.getvalue().splitlines()
    assert lines[0] == "1/4 reading train:   0%  4 images  0/s"  # in class a, before which nothing lies
    assert lines[1] == "1/4 reading train:  25%  8 images  0/s  left 0:04:00"  # in b, after a quarter
    assert lines[2] == "1/4 reading train: 8 images in 0:01:30"
    assert lines[3] == "2/4 writing train:  50%  4 images  0/s  left 0:00:40"
    assert [line for line in lines if "%" not in line][1:] == [
        "2/4 writing train: 8 images in 0:01:30",
        "3/4 reading validation: 5 images in 0:01:00",
        "4/4 writing validation: 5 images in 0:01:00",
    ]
    assert "3/4 reading validation:  80%  4 images  0/s  left 0:00:10" in lines


def test_in_a_terminal_one_line_is_redrawn_and_fits(clocked, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    progress = Progress({"a": 100, "b": 300}, 5, stream=Screen(live=True))
    watch_all(progress)
    shown = progress.stream.getvalue()
    assert shown.count("\n") == 4  # a line for each stage stays
    drawn = [line for line in shown.replace("\r\x1b[K", "\n").splitlines() if "%" in line]
    assert drawn[0] == "1/4 reading train:   0%  1 images  0/s"
    assert max(map(len, drawn)) == 39
    assert "1/4 reading train: 8 images in 0:01:30\n" in shown


def test_other_things_that_tfds_iterates_over_say_nothing():
    progress = Progress({"a": 1}, 1, stream=Screen(live=True))
    assert list(progress.watch({"train": 1}, desc="Generating splits...", unit=" splits", leave=False)) == [
        "train"
    ]
    assert progress.stream.getvalue() == ""


def test_the_place_where_tfds_stopped_is_known_and_its_line_ended(clocked):
    progress = Progress({"a": 1, "b": 1}, 5, stream=Screen(live=True))
    assert progress.place() == "before the first image"
    stream = progress.watch(TRAIN, desc="Generating train examples...")
    for _ in range(4):
        next(stream)
    assert progress.place() == "at 1/4 reading train after 3 images"
    assert not progress.stream.getvalue().endswith("\n")
    progress.close()
    progress.close()
    assert progress.stream.getvalue().endswith("/s\n")
