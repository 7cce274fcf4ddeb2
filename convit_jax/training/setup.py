"""Everything that the training loop needs, checked and built before the first step."""

import contextlib
import dataclasses
import functools
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh
from ml_collections import ConfigDict

from convit_jax.data.examples import Batch, Unreadable
from convit_jax.models.variants import abstract_model, initial_params
from convit_jax.progress import Progress
from convit_jax.rundir import checkpoint_steps, claim_run, lock_directory, wait_for_owner
from convit_jax.training import distributed
from convit_jax.training.attention_log import make_attention_log
from convit_jax.training.checkpoint import Checkpoints
from convit_jax.training.distill import Teacher, load_teacher
from convit_jax.training.distributed import agree_on_checkpoint, check_same, from_first, is_first, phase, say, together
from convit_jax.training.evaluation import our_batches
from convit_jax.training.metrics import MetricsLog
from convit_jax.training.optimizer import make_optimizer, run_schedule
from convit_jax.training.plan import Plan, make_plan
from convit_jax.training.sharding import gather, make_mesh, put_same, replicated, state_shardings
from convit_jax.training.step import (
    Arrays,
    State,
    make_eval_step,
    make_train_step,
    new_state,
    train_metrics,
)
from convit_jax.training.summary import describe_run, facts
from convit_jax.weights.pretrained import fingerprint, load_into


@dataclasses.dataclass(frozen=True)
class Steps:
    """The compiled functions of a run and what they start from, with all arrays on the devices."""

    graphdef: nnx.GraphDef
    train: Callable[[State, Arrays, Arrays], tuple[State, Arrays]]  # of state, sums, batch; donates the state
    evaluate: Callable[[Any, Arrays, Arrays], Arrays]  # parameters, sums, batch -> sums
    first: Callable[[Any], dict[str, Any]]  # parameters, or None for new ones -> {"state", "metrics"} of step 0
    shapes: Any  # and shardings of {"state", "metrics"}, the content of a checkpoint
    no_sums: Arrays  # of an empty window


@dataclasses.dataclass(frozen=True)
class Training:
    """A run that is ready for its next step."""

    config: ConfigDict
    workdir: Path  # locked by process 0
    mesh: Mesh
    plan: Plan
    facts: dict[str, Any]  # content of run.json
    steps: Steps
    state: State  # after first_step steps
    sums: Arrays  # of the open window of log_every steps
    first_step: int
    batches: Iterator[Batch]  # this process's rows, from first_step on
    test_batches: Callable[[], Iterator[Batch]]  # starts an evaluation; this process's rows
    unreadable: Unreadable  # training images
    attention_log: Callable[[Any], dict[str, Any]]  # parameters -> values for an evaluation's line of the log
    checkpoints: Checkpoints
    log: MetricsLog
    progress: Progress


@contextlib.contextmanager
def set_up(config: ConfigDict, workdir: Path) -> Iterator[Training]:
    """Builds the training of a config; leaving the context ends the writers, the loader and the lock.

    All processes call this together, and each checks that the others have the same. Raises UserError for a
    config, data, teacher, weights or run directory that cannot be used.
    """
    if not distributed.several():
        use_compilation_cache(config.compilation_cache)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    plan, teacher, teacher_params = _agree_on_plan(config, workdir, mesh)
    steps = make_steps(config, plan, mesh, teacher, teacher_params)
    del teacher_params  # their memory
    run_facts = facts(config, plan, steps.shapes["state"]["params"], mesh, teacher)

    with contextlib.ExitStack() as stack:
        start_from = _take_directory(config, workdir, plan, run_facts, stack)

        # ---- The state; the first of these that exists -------------------------------------
        # 1. The latest checkpoint in workdir: the same command continues a run.
        # 2. config.init_from, which is not read once there is a checkpoint.
        # 3. Random weights from config.seed.
        phase("opening the checkpoints")
        top1: dict[int, float] = {}  # of each evaluation: the log fills it, the checkpoints read it
        checkpoints = Checkpoints(workdir / "checkpoints", top1)
        stack.callback(checkpoints.close)
        stack.enter_context(distributed.ends_all())  # closing would wait for the other processes
        tree = _restore(checkpoints, steps, plan.total_steps) or steps.first(start_from)
        del start_from
        first_step = int(tree["state"]["step"])

        # ---- Logs and batches --------------------------------------------------------------
        log = MetricsLog(workdir if is_first() else None, first_step, top1)
        stack.callback(log.close)
        progress = Progress("step", plan.total_steps, enabled=is_first())
        stack.callback(progress.close)
        tell = progress.say if is_first() else distributed.warn
        unreadable, unreadable_test = (
            Unreadable(example.source, config.data.max_unreadable, tell) for example in (plan.train, plan.test)
        )
        rows = our_batches(plan.train, unreadable, config, config.batch_size, first_step, plan.total_steps)
        stack.callback(rows.close)
        attention_log = make_attention_log(steps.graphdef, config, plan, mesh)
        phase("the first step, which is compiled")
        yield Training(
            config=config,
            workdir=workdir,
            mesh=mesh,
            plan=plan,
            facts=run_facts,
            steps=steps,
            state=tree["state"],
            sums=tree["metrics"],
            first_step=first_step,
            batches=rows,
            test_batches=lambda: our_batches(
                plan.test, unreadable_test, config, config.eval_batch_size, 0, plan.eval_steps
            ),
            unreadable=unreadable,
            attention_log=attention_log,
            checkpoints=checkpoints,
            log=log,
            progress=progress,
        )


def _agree_on_plan(config: ConfigDict, workdir: Path, mesh: Mesh) -> tuple[Plan, Teacher | None, Any]:
    """The plan, the teacher and its parameters (None without one), the same on all processes."""
    check_same({"workdir": str(workdir), **distributed.comparable(config)})
    phase("reading the lists of images")
    plan = distributed.first_then_others(lambda: make_plan(config, devices=mesh.size))
    check_same(
        {
            "the number of training images": len(plan.train.slots.indices),
            "the number of test images": len(plan.test.indices),
            "the digest of the images' classes, labels and names": plan.image_lists,
        },
        "give all processes the same images",
    )
    if config.distill.teacher:
        phase("reading the teacher")
    which = agree_on_checkpoint(config.distill.teacher)
    with together():
        teacher, params = load_teacher(config, plan, which)
    digest = {"the digest of the teacher's weights": teacher and teacher.facts["weights"]}
    check_same(digest, "give all processes the same teacher")
    return plan, teacher, params


def make_steps(
    config: ConfigDict, plan: Plan, mesh: Mesh, teacher: Teacher | None = None, teacher_params: Any = None
) -> Steps:
    """Returns the functions of a run, compiled when they are first called; teacher_params: numpy arrays."""
    graphdef, abstract_params = abstract_model(plan.model)
    schedule = run_schedule(config, plan)
    optimizer = make_optimizer(config.optim, schedule, abstract_params)
    seed = jax.device_put(np.uint32(config.seed), replicated(mesh))
    teacher_params = put_same(teacher_params, state_shardings(mesh, teacher_params))

    no_sums = functools.partial(train_metrics, distilled=teacher is not None)

    def first(params: Any) -> dict[str, Any]:
        state = new_state(params, optimizer, ema=config.optim.ema_decay > 0)
        return {"state": state, "metrics": no_sums()}

    shardings = state_shardings(mesh, jax.eval_shape(first, abstract_params))
    start = jax.jit(first, out_shardings=shardings)
    train = jax.jit(
        make_train_step(graphdef, optimizer, schedule, config, plan.model["num_classes"], gather(mesh), teacher),
        donate_argnums=0,
        out_shardings=(shardings["state"], shardings["metrics"]),
    )
    return Steps(
        graphdef=graphdef,
        train=lambda state, sums, batch: train(state, sums, batch, seed, teacher_params),
        evaluate=jax.jit(make_eval_step(graphdef, config, gather(mesh)), out_shardings=replicated(mesh)),
        first=lambda params: start(initial_params(plan.model, config.seed) if params is None else params),
        shapes=jax.eval_shape(start, abstract_params),
        no_sums=jax.jit(no_sums, out_shardings=replicated(mesh))(),
    )


def _take_directory(
    config: ConfigDict, workdir: Path, plan: Plan, run_facts: dict[str, Any], stack: contextlib.ExitStack
) -> Any:
    """Locks the run directory for this run, and returns the parameters to start from, or None."""
    phase(f"taking {workdir}")
    owner = from_first(secrets.token_hex())
    with together():
        if is_first():
            stack.enter_context(lock_directory(workdir, owner=owner))
    with together():
        if not is_first():
            wait_for_owner(workdir, owner)
    if distributed.several() and config.compilation_cache:  # one folder for all, see docs/clusters.md
        use_compilation_cache(workdir / "compiled")
    start_from = None
    if config.init_from and not from_first(bool(checkpoint_steps(workdir))):
        start_from = _agree_on_weights(config, plan)
    with together():
        if is_first():
            claim_run(workdir, config, run_facts)
    say(describe_run(config, run_facts, workdir))
    return start_from


def _agree_on_weights(config: ConfigDict, plan: Plan) -> Any:
    """The parameters in config.init_from, the same on all processes."""
    phase("reading init_from")
    which = agree_on_checkpoint(config.init_from)
    with together():
        params, changes = load_into(config.init_from, plan.model, config.seed, which)
    digest = {"the digest of the weights of init_from": fingerprint(params)}
    check_same(digest, "give all processes the same weights")
    say("; ".join([f"Starting from {config.init_from}", *changes]))
    return params


def _restore(checkpoints: Checkpoints, steps: Steps, total_steps: int) -> dict[str, Any] | None:
    """The tree of the latest checkpoint, or None."""
    latest = from_first(checkpoints.latest)
    phase("making the first weights" if latest is None else f"reading the checkpoint of step {latest}")
    if latest is None:
        return None
    if latest > total_steps:
        raise distributed.Everywhere(
            f"the run in {checkpoints.directory.parent} is at step {latest:,}, beyond its end at "
            f"{total_steps:,}: raise steps or leave it out, or give another --workdir."
        )
    tree = checkpoints.restore(latest, steps.shapes)
    say(f"Continuing at step {latest}")
    return tree


def use_compilation_cache(folder: str | Path) -> None:
    """Keeps compiled programs in a folder, so that the next start of a run takes seconds; "" keeps none."""
    if folder:
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))
        compilation_cache.reset_cache()  # otherwise JAX stays with the folder of its first compilation
