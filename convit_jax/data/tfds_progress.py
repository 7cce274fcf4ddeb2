"""One line that tells how far TFDS is, in place of its own bars.

TFDS wraps what it iterates over in tqdm: of each split first the images read from the tar, then
the records written in their shuffled order. `Progress.watch` takes tqdm's place.
"""

import re
import shutil
import sys
import time
from datetime import timedelta

REDRAW_EVERY, PRINT_EVERY = 0.5, 30.0  # seconds, in a terminal and elsewhere


class Progress:
    """Four stages: train and validation, each read and written.

    classes: {class: bytes of its tar}, in the order of reading. validation_images: how many there are.
    """

    def __init__(self, classes, validation_images, stream=None):
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty()
        self.validation_images = validation_images
        self.before, bytes_before = {}, 0  # share of the training images that lies before a class
        for name, size in classes.items():
            self.before[name] = bytes_before / sum(classes.values())
            bytes_before += size
        self.stages, self.split, self.stage, self.done, self.drawn = 0, "", "", 0, False

    def watch(self, iterable, desc="", total=None, **_):
        """Iterate, and tell of it; TFDS calls this as it would call tqdm."""
        reading = re.match(r"Generating (train|validation) examples", desc)
        if not reading and not desc.startswith("Shuffling"):
            yield from iterable
            return
        self.stages += 1
        self.split = reading[1] if reading else self.split
        self.stage = f"{self.stages}/4 {'reading' if reading else 'writing'} {self.split}"
        total = self.validation_images if reading and self.split == "validation" else total
        self.done = 0
        since = said = time.monotonic()
        for item in iterable:
            yield item
            self.done += 1
            now = time.monotonic()
            if now - said > (REDRAW_EVERY if self.live else PRINT_EVERY):
                said = now
                # How many training images there are is not known; the tars of classes gone by tell the share.
                share = self.done / total if total else self.before[item[1]["label"]]
                self._say(share, now - since)
        self._end(f"{self.stage}: {self.done:,} images in {_clock(time.monotonic() - since)}")

    def _say(self, share, seconds):
        left = f"  left {_clock(seconds / share - seconds)}" if share else ""
        line = f"{self.stage}: {share:4.0%}  {self.done:,} images  {self.done / seconds:,.0f}/s{left}"
        if self.live:
            print("\r\x1b[K" + line[: shutil.get_terminal_size().columns - 1], end="", file=self.stream)
            self.stream.flush()
        else:
            print(line, file=self.stream, flush=True)
        self.drawn = self.live

    def _end(self, line):
        print(("\r\x1b[K" if self.drawn else "") + line, file=self.stream, flush=True)
        self.drawn = False

    def close(self):
        """End the line that is being redrawn, if one is."""
        if self.drawn:
            print(file=self.stream, flush=True)
        self.drawn = False

    def place(self):
        """Where TFDS is, for a message."""
        return f"at {self.stage} after {self.done:,} images" if self.stage else "before the first image"


def _clock(seconds):
    return str(timedelta(seconds=round(seconds)))
