"""A run directory belongs to one config: made, recognised and refused here."""

import contextlib
import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ml_collections import ConfigDict

from convit_jax.errors import UserError

# What may differ when a run continues: it changes no number of the training but for rounding (mesh,
# model.attention, model.remat, model.scan_unroll), or only how far it goes.
MAY_CHANGE = (
    "steps",
    "data.dir",
    "data.max_unreadable",
    "data.workers",
    "distill.teacher",  # its path; the weights are compared
    "mesh.data",
    "mesh.fsdp",
    "model.attention",
    "model.remat",
    "model.scan_unroll",
    "eval_batch_size",
    "eval_every",
    "locality.images",
    "locality.as_logged",
    "checkpoint_every",
    "compilation_cache",
)
# What each of several processes may have its own of; images and teacher are compared, their paths are not.
MAY_DIFFER = ("data.dir", "data.workers", "distill.teacher")

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Held(UserError):
    """Another process has the directory."""


def claim(workdir, config, facts):
    """Make a run directory, or take up the one of the same run; write config.json and run.json.

    A run that has neither saved a checkpoint nor been evaluated is begun anew, with whatever config. One that
    was evaluated had a checkpoint then: without it nothing can be continued, and its log is not given up.

    Raises:
      UserError: the directory holds another run, or one on other data or with another teacher, or one whose
        checkpoints are gone, or cannot be written.
    """
    from convit_jax.training.checkpoint import any_in  # which imports this module, as the next does

    with disk_errors(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        log = read_metrics(workdir / "metrics.jsonl")
        has_checkpoint = any_in(workdir / "checkpoints")
        if has_checkpoint or any("val_top1" in line for line in log):
            if saved := read_json(workdir / "config.json"):
                check_same_run(config, saved, workdir)
            if saved := read_json(workdir / "run.json"):
                check_same_data(facts, saved, workdir)
                check_same_teacher(facts, saved, workdir)
            if not has_checkpoint:
                raise UserError(
                    f"{workdir} holds a run without its checkpoints, and to begin anew would lose its log: "
                    "bring the checkpoints back, give another --workdir, or remove metrics.jsonl."
                )
        write_whole(workdir / "config.json", config.to_json_best_effort(indent=1) + "\n")
        write_whole(workdir / "run.json", json.dumps(facts, indent=1) + "\n")


def hold(workdir, lock="lock", *, mark="", wait=False):
    """A handle that keeps a directory for this process until it is closed, or the process is gone.

    Two runs in one directory would remove each other's half-written checkpoints.

    Args:
      lock: the name of the file that is locked; each keeps those away that ask for the same.
      mark: what is written into it, for check_shared.
      wait: until the other process is done, rather than raise.

    Raises:
      Held: another process is training there. UserError: the directory cannot be made.
    """
    with disk_errors(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        handle = (workdir / lock).open("a")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        handle.close()
        raise Held(
            f"another process is training in {workdir}: wait until it ends, or give another --workdir."
        ) from error
    except OSError:  # a file system without locks
        pass
    if mark:
        with disk_errors(workdir):
            handle.truncate(0)
            handle.write(mark)
            handle.flush()
            os.fsync(handle.fileno())
    return handle


def check_shared(workdir, mark, patience=10):
    """Wait until the mark of the process that holds a directory is seen here.

    patience: seconds; a network file system may show late what another machine has written.

    Raises:
      UserError: this process has another directory of that name.
    """
    deadline = time.monotonic() + patience
    while True:
        with contextlib.suppress(OSError):
            if (workdir / "lock").read_text() == mark:
                return
        if time.monotonic() > deadline:
            raise UserError(
                f"{workdir.absolute()} is not the directory that process 0 writes to: give all processes one "
                "--workdir on a file system that they share, as a whole path."
            )
        time.sleep(0.2)


@contextlib.contextmanager
def disk_errors(path):
    """A disk that is full or not ours to write, said in one sentence."""
    try:
        yield
    except OSError as error:
        remedy = "make room" if error.errno in FULL else "check the path and its permissions"
        raise UserError(
            f"cannot write {path} ({error.strerror}): {remedy} and start the same command again, "
            "a run continues at its last checkpoint."
        ) from error


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Opens a file that appears under its name only when it is complete.

    Args:
      path: final path. The data goes into a temporary file in the same folder first.
      mode: "w" for text or "wb" for bytes.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_whole(path, text):
    """Write a file that is never seen half-written."""
    with atomic_write(path) as file:
        file.write(text)


def read_json(path):
    """What a JSON file of a run holds; {} if it is not there. UserError if it is damaged."""
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}): remove it and start the same command again, the training is kept."
        ) from error


def read_metrics(path):
    """The lines of a metrics.jsonl as dicts, without those that a kill cut off; no file has no lines."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines


def to_agree_on(config):
    """What of a config all processes must have alike, {"optim.lr": 0.0005, ...}."""
    return {name: value for name, value in flatten(config).items() if name not in MAY_DIFFER}


def flatten(config):
    """{"optim.lr": 0.0005, ...} of a nested dict or ConfigDict as JSON gives it back."""
    if isinstance(config, ConfigDict):
        config = json.loads(config.to_json_best_effort())
    flat = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat.update({f"{name}.{key}": item for key, item in value.items()})
        else:
            flat[name] = value
    return flat


def default_config():
    """The ConfigDict of configs/default.py; an empty one where the package is installed without it."""
    try:
        from configs import default
    except ImportError:
        return ConfigDict()
    return default.get_config()


def default_fields():
    """{"optim.lr": 0.0005, ...} of it."""
    return flatten(default_config())


def changes(now, then, free):
    """["optim.lr was 0.1, is 0.2", ...] of two flat dicts, `then` perhaps saved by older code.

    A field that older code had not was at its default. free: names that do not count.
    """
    then = {**{name: value for name, value in default_fields().items() if name in now}, **then}
    return [
        f"{name} was {then.get(name)!r}, is {now.get(name)!r}"
        for name in sorted({*now, *then})
        if now.get(name) != then.get(name) and name not in free
    ]


def check_same_run(config, saved, workdir):
    """Raise UserError if a run directory holds another config; saved is the one in its config.json."""
    if changed := changes(flatten(config), flatten(saved), MAY_CHANGE):
        raise UserError(
            f"{workdir} holds a run with another config ({'; '.join(changed)}): give another --workdir, "
            "or the old values to continue that run."
        )


def check_same_data(facts, saved, workdir):
    """Raise UserError if the data of a run has changed; saved are the facts in its run.json."""
    for name in ("train_images", "test_images", "classes"):
        if name in saved and saved[name] != facts[name]:
            raise UserError(
                f"the run in {workdir} had {name} {saved[name]:,}, now there are {facts[name]:,}: bring the "
                "data back as it was to continue that run, or give another --workdir."
            )
    if "image_lists" in saved and saved["image_lists"] != facts["image_lists"]:
        raise UserError(
            f"the run in {workdir} had images of other names, labels or classes than those now given: bring "
            "the data back as it was to continue that run, or give another --workdir."
        )


def check_same_teacher(facts, saved, workdir):
    """Raise UserError if the teacher of a run has other weights; saved are the facts in its run.json."""
    then, now = (run.get("teacher") or {"source": None, "weights": None} for run in (saved, facts))
    if then["weights"] != now["weights"]:
        raise UserError(
            f"the run in {workdir} had the teacher {then['source']!r}, and is now given {now['source']!r} "
            "with other weights: set distill.teacher to those of then, or give another --workdir."
        )
