"""The progress display of every command: a live bar in a terminal, plain lines in a file."""

import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from tqdm import tqdm

FORMAT = "{desc} {n_fmt}/{total_fmt} [{bar:20}] left {remaining}{postfix}"  # tqdm puts ", " before the postfix
BAR = dict(bar_format=FORMAT, dynamic_ncols=True, smoothing=0, leave=False)


class Progress:
    """Shows on standard output how many of `total` units, such as "step", are done.

    `every` is the share of the total between two lines outside a terminal. Some processes must not print.
    """

    def __init__(self, label: str, total: int, *, every: float = 0.0, enabled: bool = True) -> None:
        self.label, self.total, self.every, self.enabled = label, total, every, enabled
        self._bar: tqdm | None = None
        self._first: int | None = None
        self._last_line = 0
        self._began = 0.0

    def start(self, done: int) -> None:
        """Starts the clock of the time left, after `done` units; else the first `update` does."""
        self.close()
        self._first = self._last_line = done
        self._began = time.monotonic()
        if self.enabled and sys.stdout.isatty():
            self._bar = tqdm(desc=self.label, total=self.total, initial=done, file=sys.stdout, **BAR)

    def update(self, done: int, text: str) -> None:
        """Shows that `done` units are done, with a text such as the loss."""
        if self._first is None:
            self.start(done)
        if self._bar is not None:
            self._bar.n = done
            self._bar.set_postfix_str(text)
        elif done == self.total or done - self._last_line >= self.every * self.total:
            self._last_line = done
            elapsed = time.monotonic() - self._began
            left = tqdm.format_meter(done, self.total, elapsed, initial=self._first, bar_format="{remaining}")
            self.say(f"{self.label} {done}/{self.total}  {text}  left {left}")

    def say(self, text: str) -> None:
        """Prints a line that stays."""
        if self.enabled:
            with tqdm.external_write_mode():
                print(text, flush=True)

    def close(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class Lasting:
    """An output stream that drops what is written after its reader has gone, as `| head` or a closed terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes, or drops, a text."""
        self._unless_gone(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Flushes the stream."""
        self._unless_gone(self._stream.flush)

    def _unless_gone(self, function: Callable[..., Any], *arguments: str) -> None:
        try:
            function(*arguments)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlive_readers() -> None:
    """Lets the process go on without output when the readers of its output streams have gone, or were never there."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
        setattr(sys, name, Lasting(stream))
