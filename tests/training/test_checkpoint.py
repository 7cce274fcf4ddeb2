"""Checkpoints: complete or absent, latest and best, independent of what the run does meanwhile."""

import jax
import jax.numpy as jnp
import numpy as np
from conftest import ROOT, run_python

from convit_jax.rundir import checkpoint_steps
from convit_jax.training.checkpoint import Checkpoints
from convit_jax.training.sharding import make_mesh, replicated


def tree(value):
    return {"state": {"w": jnp.full((8, 64), value), "step": jnp.int32(value)}}


def restore(checkpoints, step, like):
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(make_mesh(1, 1))), like)
    return checkpoints.restore(step, wanted)


def test_the_latest_and_the_best_are_kept(tmp_path):
    top1 = {}
    checkpoints = Checkpoints(tmp_path / "checkpoints", top1)
    for step, value in ((1, 50.0), (2, 70.0), (3, 60.0), (4, None), (5, 65.0), (6, None)):
        if value:
            top1[step] = value
        checkpoints.save(step, tree(float(step)))
        checkpoints.save(step, tree(0.0))  # does nothing
    checkpoints.close()
    assert checkpoint_steps(tmp_path) == [2, 6]

    (tmp_path / "checkpoints/7.orbax-checkpoint-tmp/state").mkdir(parents=True)  # a kill while writing
    checkpoints = Checkpoints(tmp_path / "checkpoints", top1)
    assert checkpoint_steps(tmp_path) == [2, 6]
    for step in (2, 6):
        np.testing.assert_array_equal(restore(checkpoints, step, tree(0.0))["state"]["w"], step)
    checkpoints.save(6, tree(0.0))  # nothing either: it is the one that was restored
    top1[6] = 71.0  # evaluated after it was saved
    checkpoints.save(7, tree(7.0))
    checkpoints.close()
    assert checkpoint_steps(tmp_path) == [6, 7]


def test_what_is_saved_is_the_state_of_that_step_though_its_memory_is_reused(tmp_path):
    overwrite = jax.jit(lambda w: w.at[0].set(-1.0), donate_argnums=0)  # in the same memory, and in no time
    overwrite(jnp.full((2048, 4096), 0.0))  # compiles
    checkpoints = Checkpoints(tmp_path / "checkpoints", {})
    state = {"w": jnp.full((2048, 4096), 3.0)}  # 32 MB take long to write
    checkpoints.save(3, jax.block_until_ready(state))
    state = {"w": overwrite(state["w"])}
    checkpoints.wait()
    assert (np.asarray(restore(checkpoints, 3, state)["w"]) == 3).all()
    checkpoints.close()


def test_a_full_disk_is_reported_and_keeps_the_last_checkpoint(tmp_path):
    script = f"""
import resource, signal, sys
sys.path[:0] = {[str(ROOT), str(ROOT / "tests")]!r}
import conftest, jax.numpy as jnp, numpy as np
from pathlib import Path
from convit_jax.errors import UserError
from convit_jax.training.checkpoint import Checkpoints
from convit_jax.training.metrics import MetricsLog
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
checkpoints, log = Checkpoints(Path("checkpoints"), {{}}), MetricsLog(Path("."), 0, {{}})
checkpoints.save(1, {{"w": jnp.ones(8)}})
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoints.save(2, {{"w": jnp.asarray(np.random.default_rng(0).random(300_000))}})
    checkpoints.close()
except UserError as error:
    print(error)
try:
    for step in range(5000):
        log.write(step, 0.0, dict(train_loss=1.0, lr=0.1))
except UserError as error:
    log.close()
    print(error)
"""
    done = run_python("-c", script, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    checkpoint, log = done.stdout.splitlines()
    assert checkpoint.startswith(f"cannot write {tmp_path}/checkpoints (File too large): free some space")
    assert log.startswith("cannot write metrics.jsonl (File too large): free some space")
    assert checkpoint_steps(tmp_path) == [1]
