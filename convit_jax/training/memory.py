"""Whether a compiled step fits into the memory that is free."""

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.stages import Compiled

GROUPS = Path("/sys/fs/cgroup")  # control groups of version 2, as containers and Slurm use them


def memory_caution(step: Compiled, devices: Sequence[jax.Device]) -> str | None:
    """Returns a warning if a step needs more memory than is free on one of these devices of this process, else None."""
    needed = step.memory_analysis()
    if needed is None:
        return None
    if devices[0].platform == "cpu":
        free = free_host_memory() / len(devices)
    else:
        stats = [device.memory_stats() or {} for device in devices]  # empty: it does not tell
        free = min(each.get("bytes_limit", math.inf) - each.get("bytes_in_use", 0) for each in stats)
    # In addition to its arguments, which are on the device.
    more = needed.temp_size_in_bytes + needed.output_size_in_bytes - needed.alias_size_in_bytes
    if more <= free:
        return None
    return (
        f"the training step needs {more / 2**30:.1f} GiB of memory on each device, but {free / 2**30:.1f} GiB are "
        "free: lower batch_size, raise accumulate, or set model.remat=True"
    )


def free_host_memory() -> float:
    """Returns the bytes that are free in the machine and in the control groups of this process, infinity if unknown."""
    free = [math.inf]
    with contextlib.suppress(OSError):  # not Linux
        machine = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free.append(1024 * int(machine["MemAvailable"].split()[0]))
        own = GROUPS / Path("/proc/self/cgroup").read_text().rpartition("::/")[2].strip()
        free += map(_free_in_group, (own, *own.parents))
    return min(free)


def _free_in_group(group: Path) -> float:
    with contextlib.suppress(OSError, ValueError):  # no group, or its limit is "max"
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return limit - used + int(stat["inactive_file"])  # files that the kernel drops at need
    return math.inf
