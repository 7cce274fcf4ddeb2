"""A run directory: whole files, one lock, one run."""

import contextlib
import errno
import fcntl
from pathlib import Path

import pytest
from conftest import python_process

from convit_jax.errors import UserError
from convit_jax.rundir import (
    DirectoryLocked,
    atomic_write,
    checkpoint_steps,
    claim_run,
    lock_directory,
    read_json,
    read_metrics,
    wait_for_owner,
)

FACTS = dict(train_images=1437, test_images=360, classes=10)


def test_file_appears_only_when_it_is_complete(tmp_path):
    with atomic_write(tmp_path / "a.txt") as file:
        file.write("first")
    with contextlib.suppress(KeyboardInterrupt), atomic_write(tmp_path / "a.txt") as file:
        file.write("second")
        raise KeyboardInterrupt
    assert (tmp_path / "a.txt").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_damaged_and_missing_files_of_a_run(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "tr')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]
    assert (read_metrics(tmp_path / "none"), read_json(tmp_path / "none")) == ([], {})
    for damaged in (b"{", b"", b'{"a": "\xff"}'):
        (tmp_path / "run.json").write_bytes(damaged)
        with pytest.raises(UserError, match=r"run.json is damaged .* remove it"):
            read_json(tmp_path / "run.json")
    (tmp_path / "config.json").mkdir()  # in place of an error of the disk
    with pytest.raises(UserError, match=r"^cannot read .*config\.json .*: check the path"):
        read_json(tmp_path / "config.json")


def test_lock_keeps_others_out_and_a_kill_frees_it(tmp_path):
    code = (
        "import pathlib, sys, time; from convit_jax.rundir import lock_directory; "
        "lock = lock_directory(pathlib.Path(sys.argv[1]), owner='me'); lock.__enter__(); "
        "print('locked', flush=True); time.sleep(60)"
    )
    with python_process("-c", code, tmp_path) as holder:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(DirectoryLocked, match="another process is training in"):
            lock_directory(tmp_path).__enter__()
        wait_for_owner(tmp_path, "me", seconds=0)  # the attempt above did not erase it
    for wait in (False, True):
        with lock_directory(tmp_path, wait=wait):
            pass


@pytest.mark.filterwarnings("ignore:flock not supported")
def test_a_lock_without_flock_may_be_left_by_a_machine_that_crashed(tmp_path, monkeypatch):
    def missing(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", missing)
    told = rf"ends, remove {tmp_path}/lock if its machine is gone, or use another"
    with lock_directory(tmp_path), pytest.raises(DirectoryLocked, match=told):
        lock_directory(tmp_path).__enter__()


def test_run_directory_belongs_to_one_config_and_its_data(digits_config, tmp_path):
    claim_run(tmp_path, digits_config, FACTS)
    digits_config.data.dir = "images"
    claim_run(tmp_path, digits_config, FACTS)
    assert read_json(tmp_path / "config.json")["data"]["dir"] == f"{Path.cwd()}/images"
    (tmp_path / "checkpoints/5").mkdir(parents=True)
    (tmp_path / "checkpoints/9.unfinished").mkdir()
    assert checkpoint_steps(tmp_path) == [5]
    digits_config.steps, digits_config.data.workers, digits_config.mesh.fsdp = 99, 5, 2
    digits_config.model.remat, digits_config.eval_every = True, 3.0
    claim_run(tmp_path, digits_config, FACTS)  # none of these changes a number
    digits_config.optim.lr, digits_config.seed = 1.0, 5
    with pytest.raises(UserError, match=r"another config \(optim.lr was 0.008, is 1.0; seed was 0, is 5\)"):
        claim_run(tmp_path, digits_config, FACTS)
    digits_config.optim.lr, digits_config.seed = 0.008, 0
    with pytest.raises(UserError, match="had train_images 1,437, now there are 1,436"):
        claim_run(tmp_path, digits_config, {**FACTS, "train_images": 1436})
    lists = {**FACTS, "image_lists": ["a", "b"]}
    claim_run(tmp_path, digits_config, lists)
    with pytest.raises(UserError, match="images with other names, labels or classes"):
        claim_run(tmp_path, digits_config, {**FACTS, "image_lists": ["a", "c"]})
    with pytest.raises(UserError, match="had the teacher None; 'x' has other weights"):
        claim_run(tmp_path, digits_config, {**lists, "teacher": {"source": "x", "weights": "y"}})
    digits_config.data.mean = None  # that of init_from, which is the run's
    claim_run(tmp_path, digits_config, lists)


def test_run_that_saved_nothing_starts_over_but_keeps_the_log_of_an_evaluation(digits_config, tmp_path):
    claim_run(tmp_path, digits_config, FACTS)
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "train_loss": 2.3}\n')
    digits_config.batch_size = 40
    claim_run(tmp_path, digits_config, {**FACTS, "train_images": 99})
    assert read_json(tmp_path / "config.json")["batch_size"] == 40
    assert read_json(tmp_path / "run.json")["train_images"] == 99
    (tmp_path / "metrics.jsonl").write_text('{"step": 4, "val_top1": 50.0}\n')
    with pytest.raises(UserError, match="has a log but no checkpoints"):  # they were lost
        claim_run(tmp_path, digits_config, {**FACTS, "train_images": 99})


def test_directory_that_cannot_be_made(digits_config, tmp_path):
    (tmp_path / "file").write_text("")
    for attempt in (lambda path: claim_run(path, digits_config, {}), lambda path: lock_directory(path).__enter__()):
        with pytest.raises(UserError, match=r"Not a directory\): check the path and its permissions"):
            attempt(tmp_path / "file" / "run")
    with pytest.raises(UserError, match="gs:/bucket/run is a URL: give a directory of this machine"):
        lock_directory(Path("gs://bucket/run")).__enter__()
