"""The progress display of every command: a live bar in a terminal, plain lines in a file."""

import sys
import time
from typing import TextIO

from tqdm import tqdm

BAR = "{desc} {n_fmt}/{total_fmt} [{bar:20}] left {remaining}{postfix}"  # tqdm puts ", " before the postfix


class Progress:
    """Shows how far a command is.

    Args:
      label: what is counted, as "step".
      total: number of units; None for a text without a bar.
      every: outside a terminal, the share of the total between two lines.
      enabled: False for processes that must not print.
      stream: standard output by default.
    """

    def __init__(
        self,
        label: str,
        total: int | None,
        *,
        every: float = 0.0,
        enabled: bool = True,
        stream: TextIO | None = None,
    ) -> None:
        self.label, self.total, self.every, self.enabled = label, total, every, enabled
        self.stream = stream or sys.stdout
        self.live = enabled and self.stream.isatty()
        self._bar: tqdm | None = None
        self._first: int | None = None
        self._last_line = 0
        self._began = 0.0

    def start(self, done: int) -> None:
        """Starts the clock of the time left, after `done` units; else the first `update` does."""
        self.close()
        self._first = self._last_line = done
        self._began = time.monotonic()
        if self.live:
            self._bar = tqdm(
                desc=self.label,
                total=self.total,
                initial=done,
                file=self.stream,
                bar_format=BAR if self.total else "{desc} {postfix}",
                dynamic_ncols=True,
                smoothing=0,
                leave=False,
            )

    def update(self, done: int, text: str) -> None:
        """Shows that `done` units are done, with a text such as the loss."""
        if self._first is None:
            self.start(done)
        if self._bar is not None:
            self._bar.n = done
            self._bar.set_postfix_str(text)
        elif self.total and (done == self.total or done - self._last_line >= self.every * self.total):
            self._last_line = done
            self.say(f"{self.label} {done}/{self.total}  {text}  left {self._left(done)}")

    def _left(self, done: int) -> str:
        assert self.total is not None
        assert self._first is not None
        if done == self._first:
            return "?"
        seconds = (time.monotonic() - self._began) / (done - self._first) * (self.total - done)
        return tqdm.format_interval(seconds)

    def say(self, text: str) -> None:
        """Prints a line that stays."""
        if self._bar is not None:
            self._bar.clear()
        if self.enabled:
            print(text, file=self.stream, flush=True)
        if self._bar is not None:
            self._bar.refresh()

    def close(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
