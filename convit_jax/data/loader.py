"""Batches from Grain: threads or worker processes call an example for the slots of each step."""

import atexit
import gc
import multiprocessing
import multiprocessing.resource_tracker
import multiprocessing.spawn
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grain
from absl import flags
from grain.multiprocessing import SharedMemoryArray

from convit_jax.data import images
from convit_jax.data.examples import Batch
from convit_jax.errors import UserError

_get_preparation_data = multiprocessing.spawn.get_preparation_data

WARNINGS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)  # of a closed terminal, and of Slurm's --signal
STOPPING = (signal.SIGINT, signal.SIGTERM, *WARNINGS)  # the main process saves for them, workers leave them to it
SHARED_MEMORY = Path("/dev/shm")  # on Linux, where the workers put their batches
WAITING = 1  # batches that are ready in each worker


def batches(
    example: Callable[[Sequence[int]], Batch],
    *,
    batch_size: int,
    start: int,
    stop: int,
    workers: int = 0,
    process: int = 0,
    processes: int = 1,
) -> Generator[Batch, None, None]:
    """Yields this process's rows of the batches of steps start .. stop - 1, which all `processes` share equally.

    `workers` processes load the images, or two threads if it is 0. The batches do not depend on it. The processes do
    not import the script that started them, so they do not see what it sets.
    """
    local = batch_size // processes

    def rows(step: int) -> Batch:
        first = step * batch_size + process * local
        return example(range(first, first + local))

    threads, ahead = (0, 0) if workers else (2, 4)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    dataset = grain.MapDataset.range(stop).map(rows)[start:].to_iter_dataset(options)
    if workers:
        multiprocessing.spawn.get_preparation_data = _prepare_process
        flags.FLAGS.mark_as_parsed()  # Grain reads absl flags, which a notebook never parses
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=WAITING)
        dataset = dataset.mp_prefetch(options, worker_init_fn=_init_worker)
    iterator = iter(dataset)
    try:
        if workers and (first := _start_workers(iterator)):
            yield first
            del first
        yield from iterator
    except RuntimeError as error:
        if not (ended := re.search(r"terminated unexpectedly with exit code (-?)(\d+)", str(error))):
            raise
        if not ended[1]:
            raise UserError(
                "a worker of the loader has ended: its own output says why; data.workers=0 loads without workers."
            ) from error
        raise UserError(
            f"a worker of the loader was killed by {signal.Signals(int(ended[2])).name}, probably because memory or "
            "/dev/shm was full: lower data.workers, or give the container more (docker run --shm-size=24g)."
        ) from error
    finally:
        iterator.close()
        del iterator, dataset
        free_shared_memory()


@atexit.register
def free_shared_memory() -> None:
    """Frees the batches that nobody uses any more; Python reports as leaked what is not free at exit."""
    if pool := SharedMemoryArray._del_thread_pool:  # there have been workers
        gc.collect()  # Grain keeps the last batches in reference cycles
        pool.apply_async(int).wait(10)  # its only thread has freed all that came before


def batches_at_once(workers: int) -> int:
    """Returns how many batches are in shared memory at most: the one in use, and for each worker WAITING and a new one.

    Grain has both twice: in the worker, and in the thread that takes batches from it.
    """
    return 2 * (WAITING + 1) * workers + 1 if workers else 0


def check_shared_memory(needed: int) -> None:
    """Raises UserError if less than `needed` bytes of shared memory are free."""
    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.exists() else needed
    if needed > free:
        raise UserError(
            f"the workers of the loaders need {needed >> 20:,} MiB of shared memory, but {SHARED_MEMORY} has "
            f"{free >> 20:,} MiB free: start the container with a larger --shm-size, lower data.workers (0 needs "
            "none), or set data.resize=host."
        )


def _start_workers(iterator: Iterator[Batch]) -> Batch | None:
    """Takes the first batch, which starts the workers, in a thread that blocks the signals of STOPPING.

    The workers inherit that, so signals to the whole process group cannot end one before `_init_worker` runs.
    The waiting thread still receives them.
    """
    multiprocessing.resource_tracker.ensure_running()  # it would unblock them in the thread that starts it
    pool = ThreadPoolExecutor(1, initializer=signal.pthread_sigmask, initargs=(signal.SIG_BLOCK, STOPPING))
    try:
        return pool.submit(next, iterator, None).result()
    finally:
        pool.shutdown(wait=False)


def _prepare_process(name: str) -> dict[str, Any]:
    """What `multiprocessing` tells a new process, of which Grain's skip importing the script that started them.

    A script without `if __name__ == "__main__":` would start its training again in each worker, and a worker that
    fails in this import leaves the process that started it waiting.
    """
    data = _get_preparation_data(name)
    if name.startswith("grain-process-prefetch"):
        data = {key: value for key, value in data.items() if not key.startswith("init_main")}
    return data


def _init_worker(worker: int, workers: int) -> None:
    """Leaves STOPPING to the main process, which needs batches until it stops, and dies with it."""
    images.in_worker = True
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
