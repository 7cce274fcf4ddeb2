"""The stream of batches: the same for threads, workers and restarts, whatever signals come."""

import contextlib
import dataclasses
import multiprocessing
import os
import signal
import sys
import threading
import time

import numpy as np
import pytest
from conftest import ROOT, assert_same, collect, run_python, wait_until
from PIL import Image

from convit_jax.data import images, loader
from convit_jax.data.examples import Slots, TrainExample, Unreadable
from convit_jax.data.sources import ImageFolder
from convit_jax.errors import UserError


@pytest.fixture
def example(image_folder):
    """Random crops of 18 images, one of which is unreadable."""
    (image_folder / "train/bee/2.jpg").write_bytes(b"not an image")
    return TrainExample(ImageFolder(image_folder, "train"), Slots(np.arange(18), 1), (8, 10), "resized")


def test_a_restart_at_any_step_continues_the_stream(example):
    steps = [example(range(5 * step, 5 * step + 5)) for step in range(7)]
    for start in (0, 1, 4):
        assert_same(collect(example, batch_size=5, start=start, stop=7), steps[start:])


def test_workers_load_the_same_stream_although_signals_reach_them(example):
    """Ctrl-C and SIGTERM reach them from their first moment on, as when they are sent to a process group."""
    before, signalled, done = {*multiprocessing.active_children()}, set(), threading.Event()

    def send_signals():
        while not done.wait(0.002):
            for worker in {*multiprocessing.active_children()} - before:
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.kill(worker.pid, signal.SIGINT)
                    os.kill(worker.pid, signal.SIGHUP)
                    os.kill(worker.pid, signal.SIGTERM)
                signalled.add(worker.pid)

    sender = threading.Thread(target=send_signals)
    sender.start()
    example = dataclasses.replace(example, canvas=32, group=3)  # for devices that crop and resize
    settings = dict(batch_size=6, start=1, stop=8)
    try:
        loaded = collect(example, workers=2, **settings)
    finally:
        done.set()
        sender.join()
    assert len(signalled) == 2
    assert_same(loaded, collect(example, **settings))
    assert any((batch["unreadable"] == 8).any() for batch in loaded)


def test_an_image_without_contrast_is_named_once_although_workers_load_it(example, image_folder, monkeypatch, capfd):
    monkeypatch.setattr(images, "_flat", [])
    Image.fromarray(np.eye(64, dtype=np.float32)).save(image_folder / "train/ant/0.jpg", "TIFF")
    Unreadable(example.source, 9, print)
    collect(example, batch_size=18, start=0, stop=1, workers=1)
    assert capfd.readouterr().err.count("ant/0.jpg (mode F) has 2 of 256 grey levels") == 1


@pytest.mark.skipif(not loader.SHARED_MEMORY.exists(), reason="Linux has it")
def test_the_shared_memory_that_workers_take_is_known(example):
    example = dataclasses.replace(example, size=(61, 67))  # no other test has it

    def held():
        sizes = []
        for entry in os.scandir(loader.SHARED_MEMORY):
            with contextlib.suppress(FileNotFoundError):  # just deleted
                sizes.append(entry.stat().st_size)
        return sizes.count(5 * 61 * 67 * 3)

    stream = loader.batches(example, batch_size=5, start=0, stop=1000, workers=2)
    next(stream)
    batch = next(stream)
    wait_until(lambda: held() == loader.batches_at_once(2), seconds=60)  # the workers fill what they may
    time.sleep(0.5)
    assert held() == loader.batches_at_once(2)
    assert [loader.batches_at_once(workers) for workers in (0, 1, 2)] == [0, 5, 9]
    del batch
    stream.close()


def killed(slots):
    os.kill(os.getpid(), signal.SIGBUS)


def test_what_killed_a_worker_is_said():
    with pytest.raises(UserError, match="killed by SIGBUS, probably because memory or /dev/shm was full"):
        collect(killed, batch_size=1, start=0, stop=4, workers=1)


def test_a_script_needs_no_guard_and_its_workers_end_with_it(tmp_path, monkeypatch):
    (tmp_path / "script.py").write_text(f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import numpy as np
from convit_jax.data.examples import EvalExample
from convit_jax.data.loader import batches
from convit_jax.data.sources import Digits
example = EvalExample(Digits("test"), np.arange(360).repeat(50), (8, 8), 1.0)  # more than a pipe takes
next(batches(example, batch_size=4, start=0, stop=90, workers=1))
os.kill(os.getpid(), 9)
""")
    done = run_python(tmp_path / "script.py", timeout=300)  # until the workers, which inherit stdout, have ended too
    assert done.returncode == -signal.SIGKILL, done.stderr
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "script.py", raising=False)
    other, grains = (loader._prepare_process(name) for name in ("other", "grain-process-prefetch-1"))
    assert [name for name in other if name not in grains] == ["init_main_from_path"]  # others do import it


@pytest.mark.parametrize(("end", "status"), [("stream.close()", 0), ("next(stream)", 1)])
def test_a_command_leaves_no_shared_memory_when_it_closes_a_stream_or_a_worker_fails(end, status):
    code = f"""
import numpy as np
from convit_jax.cli import launch
from convit_jax.data.examples import EvalExample
from convit_jax.data.loader import batches
from convit_jax.data.sources import Digits
from convit_jax.errors import UserError
example = EvalExample(Digits("test"), np.arange(360), (8, 8), 1.0)
def fails_later(slots):
    batch = example(slots)
    if slots[0]:
        raise UserError("expected")
    return batch
def main(arguments):
    stream = batches(fails_later, batch_size=4, start=0, stop=90, workers=1)
    next(stream)
    {end}
launch("test", main)
"""
    done = run_python("-W", "always", "-c", code, timeout=300)
    assert done.returncode == status, done.stderr
    assert ("test: expected" in done.stderr, "leaked" in done.stderr) == (status == 1, False)  # Python looks for it
