"""SIGTERM and Ctrl-C ask the training to save and stop."""

import contextlib
import signal
import threading
from types import FrameType
from typing import Any

from absl import logging
from jax.experimental import multihost_utils

from convit_jax.training.distributed import several


class Stop(contextlib.AbstractContextManager["Stop"]):
    """Whether the training is to save and stop.

    One process: SIGTERM or Ctrl-C sets `requested`; a second Ctrl-C raises KeyboardInterrupt. Several processes:
    JAX's preemption service takes SIGTERM on any of them, and `poll` sets `requested` on all at the same step (a
    handler in Python would replace the service's); Ctrl-C ends the process that gets it, see `distributed.join`.
    """

    def __init__(self) -> None:
        self.requested: str | None = None  # name of the signal
        self._previous: dict[int, Any] = {}

    def poll(self, step: int) -> str | None:
        """Returns `requested`; every process calls this once per step, and in an evaluation with its step.

        The service agrees on the step after the largest one that it was called with, so that between two
        steps nothing is agreed on. Orbax calls it too, with the step of a checkpoint.
        """
        if several() and multihost_utils.reached_preemption_sync_point(step):
            self.requested = "SIGTERM"
            logging.set_verbosity(logging.ERROR)  # Orbax warns that the step is reached
        return self.requested

    def __enter__(self) -> "Stop":
        if several():
            self.poll(1)  # agreed on for a signal that came before the first call
        elif threading.current_thread() is threading.main_thread():  # Python handles signals in no other
            self._previous = {n: signal.signal(n, self._handle) for n in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = signal.Signals(number).name
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
