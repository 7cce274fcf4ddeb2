"""SIGTERM, Ctrl-C and the warnings of terminals and schedulers ask the training to save and stop."""

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

from absl import logging
from jax.experimental import multihost_utils

from convit_jax.data.loader import STOPPING, WARNINGS
from convit_jax.training.distributed import several


class Stop(contextlib.AbstractContextManager["Stop"]):
    """Whether the training is to save and stop.

    One process: SIGTERM, Ctrl-C or one of WARNINGS sets `requested`; a second Ctrl-C raises KeyboardInterrupt,
    and a second SIGTERM ends the process.
    Several processes: JAX's preemption service takes SIGTERM on any of them, and `poll` sets `requested` on all at the
    same step (a handler in Python would replace the service's); WARNINGS are passed on as SIGTERM, and Ctrl-C ends the
    process that gets it, see `distributed.join`. What nohup ignores stays ignored.
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
        if threading.current_thread() is threading.main_thread():  # Python handles signals in no other
            numbers = WARNINGS if several() else STOPPING
            handled = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._handle) for number in handled}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if several():
            os.kill(os.getpid(), signal.SIGTERM)
            return
        self.requested = signal.Signals(number).name
        if number not in WARNINGS:  # a second one ends the process
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
