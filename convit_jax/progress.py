"""The progress display of every command: a live bar in a terminal, plain lines in a file."""

import contextlib
import io
import os
import shutil
import sys
import time
from typing import Any

from tqdm import tqdm

FORMAT = "{desc} {n_fmt}/{total_fmt} [{bar:20}] left {remaining}{postfix}"  # tqdm puts ", " before the postfix
BAR = dict(bar_format=FORMAT, nrows=24, smoothing=0, leave=False)  # without nrows, none where a terminal says 0 rows


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
            self._bar.dynamic_ncols = lambda _: shutil.get_terminal_size()  # 80 columns in a terminal that says 0

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

    def wait(self, text: str) -> None:
        """Shows in the bar what happens before the next update."""
        if self._bar is not None:
            self._bar.set_postfix_str(text)

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


class Lasting(io.FileIO):
    """An output that drops what is written after its reader has gone, as `| head` or a closed terminal."""

    def write(self, data: Any, /) -> int:
        """Writes, or drops, bytes."""
        with contextlib.suppress(OSError):
            written = super().write(data)
            return len(data) if written is None else written  # None: it can take no more now, and must not block
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
        return super().write(data)


def outlive_readers() -> None:
    """Lets the process go on without output when the readers of its output streams have gone, or were never there."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        number = stream.fileno() if stream else os.open(os.devnull, os.O_WRONLY)
        output = io.BufferedWriter(Lasting(number, "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(output, errors="backslashreplace", line_buffering=True))
