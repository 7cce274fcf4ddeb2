"""Which example goes into which slot, and the batches of uint8 images that the host ships.

A training run is a sequence of slots: slot = step * batch_size + row. What a slot shows is a pure
function of (seed, slot), so a run continues exactly from any step, with any number of loader
workers, and several processes share the slots of a step by rows. Grain runs it.
"""

import concurrent.futures
import dataclasses
import functools
import gc
import itertools
import multiprocessing
import multiprocessing.resource_tracker
import os
import signal
import threading

import grain
import numpy as np
from absl import flags

from convit_jax.data.images import centre_crop, crop_resize, decode, random_resized_crop_box, width_height
from convit_jax.errors import UserError

STOPPING = (signal.SIGINT, signal.SIGTERM)
GRACE = 300  # seconds that a worker goes on after SIGTERM: the first step may be compiled meanwhile
TRIES = 10  # images to show instead of one that cannot be read, before giving up


@dataclasses.dataclass(frozen=True)
class Slots:
    """The order of training: indices of the subset, shuffled anew each epoch.

    repeats > 1 is repeated augmentation (DeiT's RASampler): an epoch still shows about as many
    images as the subset has, each of them `repeats` times in a row, so that only a part of the
    subset is shown; the epoch is cut to a multiple of 256 images.
    """

    indices: np.ndarray
    seed: int
    repeats: int = 1

    @functools.cached_property
    def epoch_length(self):
        """Images shown in one epoch."""
        count = len(self.indices)
        return count if self.repeats == 1 or count < 256 else count // 256 * 256

    def example(self, slot):
        """Index into the source for a global slot number."""
        epoch, position = divmod(slot, self.epoch_length)
        return int(self.indices[_order(len(self.indices), self.seed, epoch)[position // self.repeats]])


@functools.lru_cache(maxsize=3)
def _order(count, seed, epoch):
    """A permutation of range(count) from raw Philox bits, which no version of NumPy will change."""
    return np.argsort(np.random.Philox(key=[seed, epoch]).random_raw(count), kind="stable")


@dataclasses.dataclass(frozen=True)
class TrainExample:
    """Slots -> {"image": uint8 [n, h, w, 3], "label": int32 [n], "unreadable": int64 [n]}.

    A pure function of (seed, slot). An image that cannot be read is replaced by the next one of the subset,
    most often of the same class; "unreadable" is then its index in the source, else -1.
    """

    source: object
    slots: Slots
    size: tuple
    crop: str  # "resized": random resized crop here; "pad": the centre, shifted later on the device

    def __call__(self, slots):
        batch = empty(len(slots), self.size)
        wanted = None
        for row, slot in enumerate(slots):
            index = self.slots.example(slot)
            if index != wanted:  # repeats of an image are neighbours, and decoded once
                wanted = index
                image, shown = self._readable(wanted)
            if self.crop == "resized":
                rng = np.random.Generator(np.random.Philox(key=[self.slots.seed, slot], counter=1 << 128))
                box = random_resized_crop_box(*width_height(image), rng)
                batch["image"][row] = crop_resize(image, self.size, box)
            else:
                batch["image"][row] = centre_crop(image, self.size, 1.0)
            batch["label"][row] = self.source.labels[shown]
            batch["unreadable"][row] = -1 if shown == wanted else wanted
        return batch

    def _readable(self, wanted):
        """(decoded image, its index): of the wanted index, or of the first after it that can be read."""
        subset = self.slots.indices
        place = int(np.searchsorted(subset, wanted))
        for attempt in range(TRIES):
            index = int(subset[(place + attempt) % len(subset)])
            try:
                return decode(self.source[index], self.source.names[index]), index
            except UserError as error:
                reason = error
        raise reason


@dataclasses.dataclass(frozen=True)
class EvalExample:
    """Slots -> the slot-th images of the subset, centre-cropped; past the end empty ones, "valid" False.

    An image that cannot be read is not valid either; "unreadable" is its index in the source, else -1.
    """

    source: object
    indices: np.ndarray
    size: tuple
    crop_ratio: float
    interpolation: str = "bicubic"

    def __call__(self, slots):
        batch = empty(len(slots), self.size)
        batch["valid"] = np.zeros(len(slots), bool)
        for row, slot in enumerate(slots):
            if slot >= len(self.indices):
                continue
            index = self.indices[slot]
            try:
                image = decode(self.source[index], self.source.names[index])
            except UserError:
                batch["unreadable"][row] = index
                continue
            batch["image"][row] = centre_crop(image, self.size, self.crop_ratio, self.interpolation)
            batch["label"][row] = self.source.labels[index]
            batch["valid"][row] = True
        return batch


def empty(rows, size):
    """A batch of so many black images of size (h, w), with label 0."""
    return {
        "image": np.zeros((rows, *size, 3), np.uint8),
        "label": np.zeros(rows, np.int32),
        "unreadable": np.full(rows, -1, np.int64),
    }


class Unreadable:
    """Counts the images that could not be read, names each one once, and stops at too many.

    source: of the batches. most: so many different images may fail. say: prints a line.
    """

    def __init__(self, source, most, say):
        self.source, self.most, self.say = source, most, say
        self.seen = set()

    def take(self, batch):
        """A batch without its entry "unreadable", whose images are reported.

        Raises:
          UserError: more images than allowed have failed.
        """
        batch = dict(batch)
        for index in sorted({*batch.pop("unreadable").tolist()} - {-1} - self.seen):
            self.seen.add(index)
            try:
                decode(self.source[index], self.source.names[index])
                reason = f"could not read the image {self.source.names[index]} at first: see to the disk."
            except UserError as error:
                reason = str(error)
            if len(self.seen) > self.most:
                raise UserError(
                    f"{reason[:-1]}, which is one more than data.max_unreadable={self.most} allows."
                )
            self.say(f"{reason} ({len(self.seen)} of at most {self.most} unreadable images; the run goes on)")
        return batch


def batches(example, *, batch_size, start, stop, workers=0, process=0, processes=1):
    """Iterator over the batches of steps start .. stop - 1, this process's rows of them.

    Args:
      example: TrainExample or EvalExample.
      batch_size: global, over all processes. start, stop: steps.
      workers: loader processes; 0 loads in threads of this one. The batches do not depend on it.
      process, processes: which rows are this process's.

    Yields:
      A dict of arrays with a leading axis of batch_size / processes.
    """
    local = batch_size // processes
    rows = functools.partial(_rows, example, batch_size, process * local, local)
    dataset = grain.MapDataset.range(stop).map(rows)[start:]
    threads, ahead = (1, 1) if workers else (2, 4)
    dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead))
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain reads flags of its own; we may be in a notebook
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        dataset = dataset.mp_prefetch(options, worker_init_fn=_prepare_worker)
    iterator = iter(dataset)
    try:
        if workers and (first := _start_workers(iterator)):
            yield first.pop()
        yield from iterator
    finally:
        iterator.close()
        del iterator, dataset
        gc.collect()  # Grain holds the last batches in reference cycles: their shared memory would outlive us


def _rows(example, batch_size, first, count, step):
    """Rows first .. first + count - 1 of a step."""
    return example(range(step * batch_size + first, step * batch_size + first + count))


def _start_workers(iterator):
    """[the first batch], for which Grain starts its workers, or [] if there is none.

    A Ctrl-C or SIGTERM that reaches all processes would end a worker in which _prepare_worker has not run
    yet. So the batch is taken in a thread that blocks both: Grain's threads and workers are born with them
    blocked. The caller's thread, which waits here, goes on taking them.
    """
    multiprocessing.resource_tracker.ensure_running()  # started by Grain, it would unblock them
    first = concurrent.futures.Future()

    def take():
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        try:
            first.set_result(list(itertools.islice(iterator, 1)))
        except BaseException as error:
            first.set_exception(error)

    threading.Thread(target=take, daemon=True).start()
    return first.result()


def _prepare_worker(worker, workers):
    """Leave Ctrl-C and SIGTERM, which may reach all processes, to the main one; do not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def later(*_):  # until all processes of a training have agreed to stop, it needs more batches
        timer = threading.Timer(GRACE, os._exit, (1,))
        timer.daemon = True
        timer.start()

    signal.signal(signal.SIGTERM, later)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)

    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
