"""Reports of training that never make the device wait for the host."""

import collections
import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax

from convit_jax.training.distributed import Everywhere
from convit_jax.training.evaluation import AHEAD
from convit_jax.training.setup import Training
from convit_jax.training.step import FINE, Arrays
from convit_jax.training.summary import peak_flops


class Reports(contextlib.AbstractContextManager["Reports"]):
    """Logs windows of log_every steps, each when the device has finished it.

    The device always has AHEAD steps to do. Leaving the context waits for it: it may use the loader's memory.
    """

    def __init__(self, run: Training) -> None:
        self._run = run
        self._under_way: collections.deque[tuple[int, Arrays]] = collections.deque()  # steps that may not be done
        self.restart_clock()

    def __exit__(self, *exception: object) -> None:
        jax.block_until_ready(list(self._under_way))

    def restart_clock(self) -> None:
        """Measures images per second, and the share of time in which the host waits for data, from now on."""
        self._since, self._waited, self._images = time.monotonic(), 0.0, 0  # images that the device has finished

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for data."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    def add(self, step: int, sums: Arrays) -> Arrays:
        """Takes note of a step that the device was given; returns the sums that the next one adds to."""
        self._under_way.append((step, sums))
        self._wait(0 if step == self._run.first_step + 1 else AHEAD)
        # A short last window goes on if the run gets more steps.
        return self._run.steps.no_sums if step % self._run.config.log_every == 0 else sums

    def finish(self, sums: Arrays) -> None:
        """Waits for the device, and checks the sums of the open window before they are saved."""
        self._wait(0)
        self._check_finite(jax.device_get(sums))

    def _wait(self, most: int) -> None:
        """Waits until at most this many steps are under way, and logs the windows that end meanwhile."""
        run = self._run
        while len(self._under_way) > most:
            step, sums = self._under_way.popleft()
            jax.block_until_ready(sums)
            self._images += run.plan.batch_size
            if step == run.first_step + 1:
                seconds = time.monotonic() - self._since
                run.progress.say(f"First step after {seconds:.1f} s, compilation included")
                run.progress.start(step)
                self.restart_clock()
            if step % run.config.log_every == 0 or step == run.plan.total_steps:
                self._report(step, jax.device_get(sums))

    def _report(self, step: int, sums: Any) -> None:
        seconds = max(time.monotonic() - self._since, 1e-9)
        rates = {"images_per_second": self._images / seconds, "data_wait": self._waited / seconds}
        self.restart_clock()
        self._check_finite(sums)
        run, images = self._run, int(sums["images"])
        values = {
            "train_loss": float(sums["loss"]) / images,
            "train_top1": 100 * int(sums["correct"]) / images,
            "lr": float(sums["lr"]),
            **rates,
        }
        # What a narrow terminal cuts off comes last.
        shown = "loss {train_loss:.4f}  top-1 {train_top1:.1f}  {images_per_second:.0f} img/s  "
        if peak := peak_flops(run.facts["device_kind"], run.facts["dtype"]):
            values["mfu"] = 3 * run.facts["flops"] * rates["images_per_second"] / (peak * run.mesh.size)
            shown += "MFU {mfu:.0%}  "
        shown += "epoch {epoch:.1f}  lr {lr:.2e}  data {data_wait:.0%}"
        if "distill_loss" in sums:
            values["train_distill_loss"] = float(sums["distill_loss"]) / images
        if run.unreadable.seen:
            values["unreadable_images"] = len(run.unreadable.seen)
        if run.unreadable.too_large:
            values["too_large_share"] = run.unreadable.too_large / run.unreadable.rows
        run.log.write(step, run.plan.epoch(step), values)
        run.progress.update(step, shown.format(epoch=run.plan.epoch(step), **values))

    def _check_finite(self, sums: Any) -> None:
        """Raises UserError if a loss or gradient was not finite."""
        if sums["bad_step"] == FINE:
            return
        latest, directory = self._run.checkpoints.saved, self._run.checkpoints.directory
        kept = f"step {latest} is saved" if latest else "no checkpoint was saved before it"
        raise Everywhere(
            f"the loss or its gradient is not finite at step {sums['bad_step'] + 1}; {kept} in {directory}. Start "
            "again with another --workdir and a lower optim.lr, optim.clip_norm=1, or model.dtype=float32."
        )
