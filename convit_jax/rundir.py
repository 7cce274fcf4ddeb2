"""A run directory: its lock, its files, and the rule that it belongs to one run.

It holds config.json, run.json, metrics.jsonl, curves.png and .pdf, tensorboard/, checkpoints/ and a lock.
"""

import contextlib
import errno
import json
import os
import re
import tempfile
import time
import uuid
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout
from ml_collections import ConfigDict

from convit_jax.config import compare_configs, flatten, left_to_weights, may_change
from convit_jax.errors import UserError, explained

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DirectoryLocked(UserError):
    """Another process works in the directory."""


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns errors of a full or unwritable disk into a UserError."""
    try:
        yield
    except OSError as error:
        remedy = "free some space" if error.errno in NO_SPACE else "check the path and its permissions"
        raise UserError(f"cannot write {path} ({error.strerror}): {remedy} and run the same command again.") from error


def check_output(path: Path) -> None:
    """Makes the folder of a file that is written later; raises UserError if that will fail."""
    with disk_errors(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Opens a file, "w" or "wb", that appears under its name only when it is complete."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # machines may share the folder
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically."""
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Returns the content of a run's JSON file, {} if there is none. Raises UserError if it is damaged."""
    try:
        return json.loads(_read(path)) if path.exists() else {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:  # a UserError is a ValueError, too
        words = "remove it and run the same command again; the training is kept."
        raise UserError(f"{path} is damaged ({error}): {words}") from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a metrics.jsonl without those that a kill cut off; [] if there is no file."""
    lines = []
    for text in _read(path).splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return lines


def _read(path: Path) -> bytes:
    with explained(path):
        return path.read_bytes()


def read_scores(path: Path, name: str) -> dict[int, float]:
    """Returns {step: score} of the evaluations in a metrics.jsonl, for a name such as "val_top1"."""
    return {line["step"]: line[name] for line in read_metrics(path) if name in line}


def checkpoint_steps(workdir: Path) -> list[int]:
    """Returns the steps of a run's complete checkpoints, ascending: a checkpoint gets its name last."""
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdigit())


@contextlib.contextmanager
def lock_directory(directory: Path, name: str = "lock", *, owner: str = "", wait: bool = False) -> Iterator[None]:
    """Locks a directory for this process until the context or the process ends.

    Two runs in one directory would remove each other's unfinished checkpoints. `owner` is a text for
    `wait_for_owner`. While another process has the lock, it raises DirectoryLocked, or waits.
    """
    if re.match(r"\w{2,}:/", str(directory)):
        raise UserError(f"{directory} is a URL: give a directory of this machine, or mount the bucket.")
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / name)
        try:
            lock.acquire(timeout=-1 if wait else 0)
        except Timeout as error:
            # Where flock is missing, the lock is a file with a text, which a machine that crashed leaves.
            gone = f", remove {lock.lock_file} if its machine is gone" if Path(lock.lock_file).stat().st_size else ""
            raise DirectoryLocked(
                f"another process is training in {directory}: wait until it ends{gone}, or use another --workdir."
            ) from error
        if owner:  # in another file: whoever tries to get the lock empties its file
            with atomic_write(directory / f"{name}.owner") as file:
                file.write(owner)
    try:
        yield
    finally:
        lock.release()


def wait_for_owner(workdir: Path, owner: str, seconds: float = 90) -> None:
    """Waits until the text of the lock's owner is visible, which network file systems may show late."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            if (workdir / "lock.owner").read_text() == owner:
                return
        if time.monotonic() > deadline:
            raise UserError(
                f"{workdir.absolute()} is not the directory that process 0 writes to: "
                "give all processes the same absolute --workdir on a shared file system."
            )
        time.sleep(0.2)


def claim_run(workdir: Path, config: ConfigDict, facts: Mapping[str, Any]) -> None:
    """Starts a run in a directory or continues the same run there; writes config.json and run.json.

    A run without a checkpoint and without an evaluation starts over, with any config. An evaluated run had a
    checkpoint: without it the run cannot continue, and its log must not be overwritten.
    """
    with disk_errors(workdir):
        evaluated = bool(read_scores(workdir / "metrics.jsonl", "val_top1"))
        saved = bool(checkpoint_steps(workdir))
        if saved or evaluated:
            _check_same_run(workdir, config, facts)
            if not saved:
                raise UserError(
                    f"{workdir} has a log but no checkpoints, so its run cannot continue: restore the "
                    "checkpoints, use another --workdir, or remove metrics.jsonl to start over."
                )
        record = json.loads(config.to_json_best_effort())
        if record["data"]["dir"]:  # evaluate may run in another working directory
            record["data"]["dir"] = str(Path(record["data"]["dir"]).expanduser().absolute())
        write_json(workdir / "config.json", record)
        write_json(workdir / "run.json", facts)


def check_same_config(workdir: Path, config: ConfigDict, ignored: Collection[str], option: str) -> None:
    """Raises UserError if a directory, which the flag `option` names, holds a run with another config."""
    saved = flatten(read_json(workdir / "config.json"))
    if saved and (changed := compare_configs(flatten(config), saved, {*ignored, *left_to_weights(config)})):
        raise UserError(
            f"{workdir} holds a run with another config ({'; '.join(changed)}): use another {option}, "
            "or the old values to continue that run."
        )


def _check_same_run(workdir: Path, config: ConfigDict, facts: Mapping[str, Any]) -> None:
    """Raises UserError if a directory holds a run with another config, other data or another teacher."""
    check_same_config(workdir, config, may_change(), "--workdir")
    saved = read_json(workdir / "run.json")
    remedy = "restore the data to continue that run, or use another --workdir."
    for name in ("train_images", "test_images", "classes"):
        if name in saved and saved[name] != facts[name]:
            raise UserError(f"the run in {workdir} had {name} {saved[name]:,}, now there are {facts[name]:,}: {remedy}")
    if "image_lists" in saved and saved["image_lists"] != facts["image_lists"]:
        raise UserError(f"the run in {workdir} had images with other names, labels or classes: {remedy}")
    then, now = (run.get("teacher") or {"source": None, "weights": None} for run in (saved, facts))
    if saved and then["weights"] != now["weights"]:
        raise UserError(
            f"the run in {workdir} had the teacher {then['source']!r}; {now['source']!r} has other weights: "
            "set distill.teacher to the old weights, or use another --workdir."
        )
