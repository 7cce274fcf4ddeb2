"""The training loop, to be read from top to bottom.

The device never waits for the host: steps are given to it AHEAD of time, and sums are fetched
from it when the step that made them is already done. All state is in one tree of plain arrays, all
randomness in (seed, step), so a run that was cut off continues bit for bit.
"""

import collections
import contextlib
import io
import secrets
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from convit_jax.data.loader import Unreadable, batches, empty
from convit_jax.errors import UserError
from convit_jax.figures.curves import draw_curves
from convit_jax.models.variants import abstract_model, initial_params
from convit_jax.rundir import claim_run, lock_directory, wait_for_owner
from convit_jax.training import checkpoint
from convit_jax.training.attention_log import make_attention_log
from convit_jax.training.distill import load_teacher
from convit_jax.training.distributed import (
    Everywhere,
    check_same,
    comparable,
    ends_all,
    from_first,
    in_turns,
    introduce,
    is_first,
    phase,
    say,
    several,
    together,
    warn,
)
from convit_jax.training.evaluation import AHEAD, evaluate
from convit_jax.training.metrics import Clock, Evaluations, MetricsLog, Progress
from convit_jax.training.optimizer import make_optimizer, run_schedule
from convit_jax.training.plan import make_plan
from convit_jax.training.sharding import (
    gather,
    make_mesh,
    put_batch,
    put_same,
    replicated,
    state_shardings,
)
from convit_jax.training.step import (
    FINE,
    eval_metrics,
    make_eval_step,
    make_train_step,
    new_state,
    train_metrics,
)
from convit_jax.training.stop import AgreedStop, StopSignals, with_votes
from convit_jax.training.summary import describe_run, facts, peak_flops
from convit_jax.weights.pretrained import fingerprint, load_into
from convit_jax.weights.run import agree_on_checkpoint


def train(config, workdir):
    """Train a model, or continue a run that was stopped.

    Args:
      config: ConfigDict with the fields of configs/default.py.
      workdir: run directory; gets config.json, run.json, metrics.jsonl, curves.png and .pdf,
        tensorboard/ and checkpoints/.

    Returns:
      The last line of metrics.jsonl with an evaluation (step, epoch, val_top1 and val_top5 in per
      cent, val_loss), or None if a signal stopped the run before its end. Process 0 alone writes and prints.

    Raises:
      UserError: a config, data or disk that cannot work, or a loss that is not finite.
    """
    workdir = Path(workdir).expanduser()
    if not several():
        use_compilation_cache(config.compilation_cache)

    # ---- What to do, checked before anything expensive -------------------------------------
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    introduce(mesh)
    check_same({"workdir": str(workdir), **comparable(config)})
    phase("reading the lists of images")
    plan = in_turns(lambda: make_plan(config, devices=mesh.size))
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
        teacher, teacher_params = load_teacher(config, plan, which)
    taught = {"the digest of the teacher's weights": teacher and teacher.facts["weights"]}
    check_same(taught, "give all processes the same teacher")

    # ---- Model, optimizer, compiled steps --------------------------------------------------
    graphdef, abstract_params = abstract_model(plan.model)
    schedule = run_schedule(config, plan)
    optimizer = make_optimizer(config.optim, schedule, abstract_params)

    def empty_window():
        return train_metrics(distilled=teacher is not None)

    def fresh(seed, params=None):
        params = initial_params(plan.model, seed) if params is None else params
        state = new_state(params, optimizer, ema=config.optim.ema_decay > 0)
        return {"state": state, "metrics": empty_window()}

    seed = jax.device_put(np.uint32(config.seed), replicated(mesh))
    shapes = jax.eval_shape(fresh, seed)
    shardings = state_shardings(mesh, shapes)
    train_step = jax.jit(
        with_votes(
            make_train_step(
                graphdef, optimizer, schedule, config, plan.model["num_classes"], gather(mesh), teacher
            )
        ),
        donate_argnums=0,
        out_shardings=(shardings["state"], shardings["metrics"], replicated(mesh)),
    )
    eval_step = jax.jit(make_eval_step(graphdef, config, gather(mesh)), out_shardings=replicated(mesh))
    no_metrics, no_eval = jax.jit(lambda: (empty_window(), eval_metrics()), out_shardings=replicated(mesh))()
    teacher_params = put_same(teacher_params, state_shardings(mesh, teacher_params))

    def rows(example, batch_size, first, last):
        """This process's share of the batches of steps first .. last - 1."""
        return batches(
            example,
            batch_size=batch_size,
            start=first,
            stop=last,
            workers=min(config.data.workers, (last - first) // 4),  # starting them takes seconds
            process=jax.process_index(),
            processes=jax.process_count(),
        )

    with StopSignals() as signals, contextlib.ExitStack() as stack:
        stop = AgreedStop(signals, mesh)
        # ---- The run directory is ours before anything in it is read or written ------------
        phase(f"taking {workdir}")
        run = facts(config, plan, abstract_params, mesh.shape, jax.devices()[0].device_kind, teacher)
        mark = from_first(secrets.token_hex())
        with together():
            if is_first():
                stack.callback(lock_directory(workdir, owner=mark).release)
        with together():
            if not is_first():
                wait_for_owner(workdir, mark)
        if several() and config.compilation_cache:  # a folder of all: who compiles waits for the others to
            use_compilation_cache(workdir / "compiled")
        start_from, changes = None, ()
        if config.init_from and not from_first(checkpoint.any_in(workdir / "checkpoints")):
            phase("reading init_from")
            which = agree_on_checkpoint(config.init_from)
            with together():  # before the config is written
                start_from, changes = load_into(config.init_from, plan.model, config.seed, which)
            digest = {"the digest of the weights of init_from": fingerprint(start_from)}
            check_same(digest, "give all processes the same weights")
        with together():
            if is_first():
                claim_run(workdir, config, run)
        say(describe_run(config, run, workdir))

        # ---- How training starts: continue this run; from init_from; from scratch ----------
        top1 = {}  # of the evaluations so far, by step
        phase("opening the checkpoints")
        checkpoints = checkpoint.open_checkpoints(workdir / "checkpoints", top1)
        stack.callback(checkpoint.close, checkpoints)
        stack.enter_context(ends_all())  # closing would wait for the other processes
        latest = from_first(checkpoints.latest and checkpoints.latest.step)
        phase("making the first weights" if latest is None else f"reading the checkpoint of step {latest}")
        if latest is not None:
            check_not_beyond(latest, plan.total_steps, workdir)
            tree = checkpoint.restore(checkpoints, shapes, shardings, latest)
            say(f"Continuing at step {latest}")
        else:
            if start_from is not None:
                say("; ".join([f"Starting from {config.init_from}", *changes]))
            tree = jax.jit(fresh, out_shardings=shardings)(seed, start_from)
            start_from = None  # its memory
        state, metrics = tree["state"], tree["metrics"]
        step = saved = start = int(state["step"])
        log = MetricsLog(workdir, start, top1) if is_first() else Evaluations(top1)
        stack.callback(log.close)
        log.recall(from_first(log.lines))
        progress = Progress(plan.total_steps, start, None if is_first() else io.StringIO())
        clock = Clock()
        tell = progress.say if is_first() else warn
        unreadable = Unreadable(plan.train.source, config.data.max_unreadable, tell)
        unreadable_test = Unreadable(plan.test.source, config.data.max_unreadable, tell)
        attention_log = make_attention_log(graphdef, config, plan, mesh)
        train_batches = rows(plan.train, config.batch_size, start, plan.total_steps)
        stack.callback(train_batches.close)
        recent = collections.deque()  # the largest vote of each step that is under way
        stack.callback(lambda: jax.block_until_ready(list(recent)))  # they may use the loader's memory
        windows = collections.deque()  # closed windows of log_every steps, not yet reported

        def settle(most):
            """Wait until at most so many steps are under way."""
            while len(recent) > most:
                stop.count(recent.popleft())
                clock.count(config.batch_size)

        def report(last_step, sums, images_per_second, data_wait):
            """Log a window whose last step is done."""
            sums = jax.device_get(sums)
            check_finite(sums, checkpoints)
            values = {
                "train_loss": float(sums["loss"]) / int(sums["images"]),
                "train_top1": 100 * int(sums["correct"]) / int(sums["images"]),
                "lr": float(sums["lr"]),
                "images_per_second": images_per_second,
                "data_wait": data_wait,
            }
            if peak := peak_flops(run["device_kind"], run["dtype"]):
                values["mfu"] = 3 * run["flops"] * images_per_second / (peak * mesh.size)
            if teacher:
                values["train_distill_loss"] = float(sums["distill_loss"]) / int(sums["images"])
            if unreadable.seen:
                values["unreadable_images"] = len(unreadable.seen)
            log.write(last_step, plan.epoch(last_step), values)
            progress.update(last_step, plan.epoch(last_step), values)

        def evaluate_now(state):
            """{"val_top1": per cent, ...} of the weights and of their average; None if stopped."""
            models = {"val": state["params"]} | ({"val_ema": state["ema"]} if "ema" in state else {})
            test_batches = rows(plan.test, config.eval_batch_size, 0, plan.eval_steps)
            readable = map(unreadable_test.take, test_batches)
            results = evaluate(models, readable, eval_step, no_eval, mesh, stopped=stop.ask)
            names = ("top1", "top5", "loss")
            return results and {f"{m}_{name}": results[m][name] for m in models for name in names}

        # ---- Training ----------------------------------------------------------------------
        if step == 0 and (looks := attention_log(state["params"])):
            log.write(0, 0.0, looks)
        phase("the first step, which is compiled")
        while True:
            # Where it is due, evaluate and save. A signal saves at once; what it left without an
            # evaluation gets it when the run continues.
            stopping = stop.requested or stop.given_up
            due = step in plan.eval_at and step not in top1
            if due or stopping or step % config.checkpoint_every == 0:
                settle(0)
                stop.raise_if_given_up()
                stopping = stop.requested
                while windows:
                    report(*windows.popleft())
                check_finite(jax.device_get(metrics), checkpoints)
                with clock.paused():
                    if step != saved:  # first: whatever goes wrong in the evaluation, this is safe
                        checkpoint.save(checkpoints, step, {"state": state, "metrics": metrics})
                        saved = step
                    values = evaluate_now(state) if due and not stopping else None
                    if values is not None:
                        checkpoint.wait(checkpoints)  # a log must not tell of weights that were lost
                        log.write(step, plan.epoch(step), values | attention_log(state["params"]))
                        progress.evaluated(step, plan.epoch(step), values)
                if due and values is None and not stopping:  # a signal came during the evaluation
                    continue
            if stopping or step == plan.total_steps:
                break

            # One step.
            try:
                if stop.error is None:
                    with clock.waiting():
                        batch = put_batch(unreadable.take(next(train_batches)), mesh)
            except Exception as error:
                if stop.requested:  # the signal reached the loader's workers as well
                    continue
                if not (several() and isinstance(error, UserError)):
                    raise
                stop.error = error
            if stop.error is not None:  # the others are under way: go on with them until all know of it
                blank = empty(config.batch_size // jax.process_count(), plan.train.size)
                batch = put_batch(unreadable.take(blank), mesh)
            votes = stop.votes()
            began = time.monotonic()
            with jax.transfer_guard("disallow"):  # nothing may slip in from the host by accident
                state, metrics, largest_vote = train_step(state, metrics, batch, votes, seed, teacher_params)
            del batch  # its memory is free when the step is done, not one step later
            step += 1
            recent.append(largest_vote)
            if step == start + 1:
                settle(0)
                progress.first_step(time.monotonic() - began)
                clock.restart()
            settle(AHEAD)

            # Report, late.
            full = step % config.log_every == 0
            if full or step == plan.total_steps:
                windows.append((step, metrics, *clock.read()))
                metrics = no_metrics if full else metrics  # what a longer run goes on with
            while windows and windows[0][0] <= step - AHEAD and not stop.given_up:
                report(*windows.popleft())

    # ---- The end ---------------------------------------------------------------------------
    curves = draw_curves(workdir, workdir)[0] if is_first() else None
    if stopping:
        where = f", saved in {workdir}" if step else ", before the first step"
        progress.say(f"Stopped by {stopping} at step {step}{where}. The same command continues.")
        return None
    progress.finished(log.last, workdir, curves)
    return log.last


def check_not_beyond(latest, total, workdir):
    """Refuse to continue a run that has gone further than it shall go."""
    if latest > total:
        raise Everywhere(
            f"the run in {workdir} is at step {latest:,}, beyond the {total:,} that it shall go: "
            "raise steps, leave it out, or give another --workdir."
        )


def check_finite(sums, checkpoints):
    """Stop a run whose loss or gradient was not finite, before that state is saved."""
    bad_step = int(sums["bad_step"])
    if bad_step != FINE:
        latest = checkpoints.latest
        kept = f"step {latest.step} is saved" if latest else "no checkpoint was saved before it"
        again = "Start again with another --workdir and" if latest else "Start again with"
        raise Everywhere(
            f"The loss or its gradient stopped being finite at step {bad_step + 1}; {kept} in "
            f"{checkpoints.directory}. {again} a lower optim.lr, optim.clip_norm=1, or model.dtype=float32."
        )


def use_compilation_cache(folder):
    """Keep compiled programs in a folder, so that the next start of the same run takes seconds."""
    if folder:
        jax.config.update("jax_compilation_cache_dir", str(Path(folder).expanduser()))
        compilation_cache.reset_cache()  # else the folder of the first compilation stays
