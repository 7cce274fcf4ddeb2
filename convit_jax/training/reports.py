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
from convit_jax.training.step import FINE
from convit_jax.training.summary import peak_flops

Sums = dict[str, jax.Array]  # of the steps of a window, see step.train_metrics


class Clock:
    """Images per second, and the share of time in which the host waits for data, of a window of steps."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Starts a window now."""
        self._since, self._waited, self._images = time.monotonic(), 0.0, 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for data."""
        start = time.monotonic()
        yield
        self._waited += time.monotonic() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the time inside."""
        start = time.monotonic()
        yield
        self._since += time.monotonic() - start

    def count(self, images: int) -> None:
        """Adds images that the device has finished."""
        self._images += images

    def read(self) -> dict[str, float]:
        """Returns the window's "images_per_second" and "data_wait" (a share), and starts the next one."""
        seconds = max(time.monotonic() - self._since, 1e-9)
        rates = {"images_per_second": self._images / seconds, "data_wait": self._waited / seconds}
        self.restart()
        return rates


class Reports(contextlib.AbstractContextManager["Reports"]):
    """Logs windows of log_every steps, each when the device has long finished it.

    The device always has AHEAD steps to do: `add` waits for the step before these, and logs a window whose
    last step is done. Leaving the context waits for the device, which may use the loader's memory.

    Attributes:
      clock: of the open window.
    """

    def __init__(self, run: Training) -> None:
        self.clock = Clock()
        self._run = run
        self._start = time.monotonic()
        self._under_way: collections.deque[Sums] = collections.deque()  # of the steps that may not be done
        self._windows: collections.deque[tuple[int, Sums, dict[str, float]]] = collections.deque()

    def __exit__(self, *exception: object) -> None:
        jax.block_until_ready(list(self._under_way))

    def add(self, step: int, sums: Sums) -> Sums:
        """Takes note of a step that was given to the device.

        Args:
          step: number of steps given so far.
          sums: of the open window with this step, on the devices.

        Returns:
          The sums that the next step adds to.

        Raises:
          UserError: the loss of an earlier window is not finite, or the log cannot be written.
        """
        run = self._run
        self._under_way.append(sums)
        if step == run.first_step + 1:
            self._wait(0)
            seconds = time.monotonic() - self._start
            run.progress.say(f"First step after {seconds:.1f} s, compilation included")
            run.progress.start(step)
            self.clock.restart()
        self._wait(AHEAD)
        full = step % run.config.log_every == 0
        if full or step == run.plan.total_steps:
            self._windows.append((step, sums, self.clock.read()))
        while self._windows and self._windows[0][0] <= step - AHEAD:
            self._report(*self._windows.popleft())
        return run.steps.no_sums if full else sums  # a short last window goes on if the run gets more steps

    def finish(self, sums: Sums) -> None:
        """Waits for the device, logs all windows and checks the open one's sums; raises as `add` does."""
        self._wait(0)
        while self._windows:
            self._report(*self._windows.popleft())
        self._check_finite(jax.device_get(sums))

    def _wait(self, most: int) -> None:
        """Waits until at most this many steps are under way."""
        while len(self._under_way) > most:
            jax.block_until_ready(self._under_way.popleft())
            self.clock.count(self._run.config.batch_size)

    def _report(self, step: int, on_devices: Sums, rates: dict[str, float]) -> None:
        """Logs a window whose last step is done."""
        run, sums = self._run, jax.device_get(on_devices)
        self._check_finite(sums)
        images = int(sums["images"])
        values = {
            "train_loss": float(sums["loss"]) / images,
            "train_top1": 100 * int(sums["correct"]) / images,
            "lr": float(sums["lr"]),
            **rates,
        }
        if peak := peak_flops(run.facts["device_kind"], run.facts["dtype"]):
            flops = 3 * run.facts["flops"] * rates["images_per_second"]
            values["mfu"] = flops / (peak * run.mesh.size)
        if "distill_loss" in sums:
            values["train_distill_loss"] = float(sums["distill_loss"]) / images
        if run.unreadable.seen:
            values["unreadable_images"] = len(run.unreadable.seen)
        run.log.write(step, run.plan.epoch(step), values)
        run.progress.update(step, _line(run.plan.epoch(step), values))

    def _check_finite(self, sums: Any) -> None:
        """Stops a run whose loss or gradient was not finite, before that state is saved."""
        bad_step = int(sums["bad_step"])
        if bad_step == FINE:
            return
        latest, directory = self._run.checkpoints.latest, self._run.checkpoints.directory
        kept = f"step {latest} is saved" if latest else "no checkpoint was saved before it"
        again = "Start again with another --workdir and" if latest else "Start again with"
        raise Everywhere(
            f"the loss or its gradient is not finite at step {bad_step + 1}; {kept} in {directory}. "
            f"{again} a lower optim.lr, optim.clip_norm=1, or model.dtype=float32."
        )


def _line(epoch: float, values: dict[str, float]) -> str:
    """The text of a window for the progress display, which a narrow terminal cuts off at its end."""
    mfu = f"MFU {values['mfu']:.0%}  " if "mfu" in values else ""
    return (
        f"loss {values['train_loss']:.4f}  top-1 {values['train_top1']:.1f}  "
        f"{values['images_per_second']:.0f} img/s  {mfu}epoch {epoch:.1f}  lr {values['lr']:.2e}  "
        f"data {values['data_wait']:.0%}"
    )
