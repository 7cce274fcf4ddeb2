"""SIGTERM and Ctrl-C ask the loop to save and stop; a second Ctrl-C stops at once.

Where there are several processes, a signal on any of them stops all, after the same step: each puts the
number of its signal, or 0, beside its batch, and the step's largest comes back with its results.
"""

import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np

from convit_jax.training.distributed import together
from convit_jax.training.sharding import batch_sharding, replicated


class StopSignals:
    """Context manager; `requested` is the signal's name once one came, else None.

    Outside the main thread, where Python lets nobody set handlers, it never asks for a stop.
    """

    def __init__(self):
        self.requested = None
        self._previous = {}

    def _handle(self, number, frame):
        self.requested = signal.Signals(number).name
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception):
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class AgreedStop:
    """`requested` as all processes know it, at the same step on each of them.

    One process need not ask anybody: what its StopSignals says holds at once.
    """

    EVERY = 8  # batches of an evaluation between two questions
    GIVE_UP = 1000  # the vote of a process that cannot go on; signals have smaller numbers

    def __init__(self, own, mesh):
        self.own, self.alone = own, jax.process_count() == 1
        self._mesh, self._agreed, self._calls = mesh, None, 0
        self.error = None  # why this process gives up, a UserError
        self.given_up = False  # whether all know that one of them does
        self._votes = {0: self._vote(0)}  # on the devices, so that a step ships nothing more
        self._largest = jax.jit(jnp.max, out_shardings=replicated(mesh))

    def _vote(self, number):
        rows = np.full(len(self._mesh.local_devices), number, np.int32)
        return jax.make_array_from_process_local_data(batch_sharding(self._mesh), rows)

    @property
    def requested(self):
        """The signal's name, or None."""
        return self.own.requested if self.alone else self._agreed

    def votes(self):
        """int32 [devices]: this process's signal, GIVE_UP or 0 on each of its devices."""
        number = 0
        if self.error is not None:
            number = self.GIVE_UP
        elif self.own.requested and not self.alone:
            number = int(signal.Signals[self.own.requested])
        if number not in self._votes:
            self._votes[number] = self._vote(number)
        return self._votes[number]

    def count(self, largest):
        """Take note of the largest vote of a step that is done, an array on the devices."""
        number = int(largest)
        if number == self.GIVE_UP:
            self.given_up = True
        elif number:
            self._agreed = signal.Signals(number).name

    def raise_if_given_up(self):
        """Raise the error of the process that gave up, on all of them."""
        if self.given_up:
            with together():
                if self.error is not None:
                    raise self.error

    def ask(self):
        """Between batches of an evaluation, by all processes alike: the signal's name, or None."""
        if not self.alone and self._calls % self.EVERY == 0:
            self.count(self._largest(self.votes()))
        self._calls += 1
        return self.requested


def with_votes(step):
    """A training step that takes votes after the batch, and returns the largest."""

    def voting(state, metrics, batch, votes, seed, teacher_params):
        return *step(state, metrics, batch, seed, teacher_params), jnp.max(votes)

    return voting
