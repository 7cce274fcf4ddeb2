"""Checkpoints: whole or absent, latest and best, independent of what the run does meanwhile."""

import resource
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from conftest import ROOT

from convit_jax.training import checkpoint
from convit_jax.training.sharding import make_mesh, state_shardings


def tree(value):
    return {"state": {"w": jnp.full((8, 64), value), "step": jnp.int32(value)}}


def abstract():
    shapes = jax.eval_shape(lambda: tree(0.0))
    return shapes, state_shardings(make_mesh(1, 1), shapes)


def test_latest_and_best_are_kept(tmp_path):
    top1 = {}
    checkpoints = checkpoint.open_checkpoints(tmp_path, top1)
    for step, value in ((1, 50.0), (2, 70.0), (3, 60.0), (4, None), (5, 65.0), (6, None)):
        if value:
            top1[step] = value
        checkpoint.save(checkpoints, step, tree(float(step)))
    checkpoint.close(checkpoints)
    checkpoints = checkpoint.open_checkpoints(tmp_path, top1)
    assert [kept.step for kept in checkpoints.checkpoints] == [2, 6]
    for step in (2, None):
        restored = checkpoint.restore(checkpoints, *abstract(), step)
        np.testing.assert_array_equal(restored["state"]["w"], step or 6)
    top1[6] = 71.0  # evaluated after it was saved
    checkpoint.save(checkpoints, 7, tree(7.0))
    checkpoint.close(checkpoints)
    assert sorted(int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()) == [6, 7]


def test_what_is_saved_is_the_state_of_that_step_though_its_memory_is_given_away(tmp_path):
    # In the same memory, and in no time: the first row alone changes.
    overwrite = jax.jit(lambda t: {"w": t["w"].at[0].set(-1.0)}, donate_argnums=0)
    for attempt in range(10):  # a busy machine may write before we overwrite
        checkpoints = checkpoint.open_checkpoints(tmp_path / str(attempt), {})
        state = {"w": jnp.full((2048, 4096), 3.0)}  # 32 MB, so that writing takes long
        overwrite_now = overwrite.lower(state).compile()
        checkpoint.save(checkpoints, 3, jax.block_until_ready(state))
        state = jax.block_until_ready(overwrite_now(state))
        still_writing = not (tmp_path / str(attempt) / "3").exists()
        checkpoint.close(checkpoints)
        if still_writing:
            break
    assert still_writing, "the state was overwritten too late to matter"
    checkpoints = checkpoint.open_checkpoints(tmp_path / str(attempt), {})
    shapes = jax.eval_shape(lambda: state)
    restored = checkpoint.restore(checkpoints, shapes, state_shardings(make_mesh(1, 1), shapes))
    assert (np.asarray(restored["w"]) == 3).all()
    checkpoint.close(checkpoints)


def test_a_half_written_checkpoint_is_never_taken_for_one(tmp_path):
    checkpoints = checkpoint.open_checkpoints(tmp_path, {})
    checkpoint.save(checkpoints, 1, tree(1.0))
    checkpoint.close(checkpoints)
    (tmp_path / "2.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    checkpoints = checkpoint.open_checkpoints(tmp_path, {})
    assert checkpoints.latest.step == 1
    checkpoint.close(checkpoints)


def test_a_disk_that_is_full_is_said_and_the_last_checkpoint_stays(tmp_path):
    script = f"""
import signal, sys
sys.path[:0] = {[str(ROOT), str(ROOT / "tests")]!r}
import conftest, jax.numpy as jnp, resource
from convit_jax.training import checkpoint
from convit_jax.errors import UserError
checkpoints = checkpoint.open_checkpoints({str(tmp_path)!r}, {{}})
checkpoint.save(checkpoints, 1, {{"w": jnp.ones(8)}})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
    checkpoint.close(checkpoints)  # the first one is whole before the disk fills
    checkpoints = checkpoint.open_checkpoints({str(tmp_path)!r}, {{}})
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    import numpy as np
    checkpoint.save(checkpoints, 2, {{"w": jnp.asarray(np.random.default_rng(0).random(300_000))}})
    checkpoint.close(checkpoints)
except UserError as error:
    print("said:", error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "could not be written" in done.stdout, done.stdout + done.stderr[-3000:]
    assert "last good one is of step 1" in done.stdout
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    checkpoints = checkpoint.open_checkpoints(tmp_path, {})
    assert checkpoints.latest.step == 1
    checkpoint.close(checkpoints)
