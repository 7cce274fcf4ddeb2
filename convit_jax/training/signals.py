"""SIGTERM and Ctrl-C ask the loop to save and stop; a second Ctrl-C stops at once."""

import signal
import threading


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
