"""Everything that the training loop needs, checked and built before the first step."""

import contextlib
import functools
import secrets
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh
from ml_collections import ConfigDict

from convit_jax.data.examples import Unreadable
from convit_jax.data.loader import check_shared_memory
from convit_jax.models.variants import abstract_model, initial_params
from convit_jax.progress import Progress
from convit_jax.rundir import checkpoint_steps, claim_run, lock_directory, read_json, wait_for_owner
from convit_jax.training import distributed
from convit_jax.training.attention_log import make_attention_log
from convit_jax.training.autotune import choose_forms
from convit_jax.training.checkpoint import Checkpoints
from convit_jax.training.distill import Teacher, load_teacher
from convit_jax.training.distributed import check_same, from_first, is_first, phase, say, several, together
from convit_jax.training.evaluation import our_batches, shared_memory
from convit_jax.training.memory import memory_caution
from convit_jax.training.metrics import MetricsLog
from convit_jax.training.optimizer import make_optimizer, run_schedule
from convit_jax.training.plan import Plan, device_resizes, follow_weights, make_plan
from convit_jax.training.sharding import gather, make_mesh, put_same, replicated, state_shardings
from convit_jax.training.step import Arrays, State, make_eval_step, make_train_step, new_state, train_metrics
from convit_jax.training.summary import describe_run, facts
from convit_jax.weights.pretrained import fingerprint, load_into
from convit_jax.weights.run import Damaged


class Steps:
    """The functions of a run, compiled when they are first called, and what they start from, on the devices."""

    def __init__(
        self, config: ConfigDict, plan: Plan, mesh: Mesh, teacher: Teacher | None = None, teacher_params: Any = None
    ) -> None:
        """teacher_params: numpy arrays."""
        self.graphdef, abstract_params = abstract_model(plan.model)
        schedule, whole = run_schedule(config, plan), gather(mesh)
        optimizer = make_optimizer(config.optim, schedule, abstract_params)
        no_sums = functools.partial(train_metrics, distilled=teacher is not None)

        def first(params: Any) -> dict[str, Any]:
            state = new_state(params, optimizer, ema=config.optim.ema_decay > 0)
            return {"state": state, "metrics": no_sums()}

        shardings = state_shardings(mesh, jax.eval_shape(first, abstract_params))
        self.first = jax.jit(first, out_shardings=shardings)  # of parameters: the content of a checkpoint of step 0
        train = make_train_step(self.graphdef, optimizer, schedule, config, plan.model["num_classes"], whole, teacher)
        compiled = jax.jit(train, donate_argnums=0, out_shardings=(shardings["state"], shardings["metrics"]))
        fixed = {
            "seed": jax.device_put(np.uint32(config.seed), replicated(mesh)),
            "teacher_params": put_same(teacher_params, state_shardings(mesh, teacher_params)),
        }
        self.train = functools.partial(compiled, **fixed)  # (state, sums, batch) -> (state, sums); donates the state
        self.lower_train = functools.partial(compiled.lower, **fixed)
        evaluate = make_eval_step(self.graphdef, config.data.mean, config.data.std, whole)
        self.evaluate = jax.jit(evaluate, out_shardings=replicated(mesh))
        self.shapes = jax.eval_shape(self.first, abstract_params)  # and shardings of that content
        self.no_sums: Arrays = jax.jit(no_sums, out_shardings=replicated(mesh))()  # of an empty window


class Training:
    """A run that is ready for its next step. All processes build it together and check that they have the same."""

    def __init__(self, config: ConfigDict, workdir: Path, stack: contextlib.ExitStack) -> None:
        """stack: ends the writers, the loader and the lock."""
        self.mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
        check_same({"workdir": str(workdir), **distributed.comparable(config)})
        kept = from_first(lambda: read_json(workdir / "run.json") if checkpoint_steps(workdir) else None)
        with together():
            config = follow_weights(config, workdir if kept is not None else None)
        self.config, self.workdir = config, workdir

        # ---- The images, the forms and the teacher -----------------------------------------
        phase("reading the lists of images")
        devices, on_device = self.mesh.size, device_resizes(config, config.data.interpolation, kept)
        self.plan = distributed.first_then_others(lambda: make_plan(config, devices=devices, on_device=on_device))
        for example in (self.plan.train, self.plan.test):
            if example.source.note:
                say(example.source.note)
        phase("choosing the form of attention")
        self.plan = choose_forms(config, self.plan, self.mesh.size, kept)
        if config.distill.teacher:
            phase("reading the teacher")
        with together():
            teacher, teacher_params = load_teacher(config, self.plan)
        check_same(
            {
                **distributed.comparable(config),
                "the numbers of images": [len(self.plan.train.slots.indices), len(self.plan.test.indices)],
                "the digest of the images' classes, labels and names": self.plan.image_lists,
                "the digest of the teacher's weights": teacher and teacher.facts["weights"],
            },
            "give all processes the same images, weights and teacher",
        )
        self.steps = Steps(config, self.plan, self.mesh, teacher, teacher_params)
        del teacher_params  # their memory
        self.facts = facts(config, self.plan, self.steps.shapes["state"]["params"], self.mesh, teacher)  # run.json
        start_from = self._take_directory(stack, continues=kept is not None)

        # ---- The state; the first of these that exists -------------------------------------
        # 1. The latest checkpoint in workdir: the same command continues a run.
        # 2. config.init_from, which is not read once there is a checkpoint.
        # 3. Random weights from config.seed.
        phase("opening the checkpoints")
        top1: dict[int, float] = {}  # of each evaluation: the log fills it, the checkpoints read it
        self.checkpoints = Checkpoints(workdir / "checkpoints", top1)
        stack.callback(self.checkpoints.close)
        stack.enter_context(distributed.ends_all())  # closing would wait for the other processes
        tree = self._restore() or self.steps.first(start_from or initial_params(self.plan.model, config.seed))
        self.state: State = tree["state"]  # after first_step steps
        self.sums: Arrays = tree["metrics"]  # of the open window of log_every steps
        self.first_step = int(self.state["step"])

        # ---- Logs and batches --------------------------------------------------------------
        self.log = MetricsLog(workdir if is_first() else None, self.first_step, top1)
        stack.callback(self.log.close)
        self.progress = Progress("step", self.plan.total_steps, enabled=is_first())
        stack.callback(self.progress.close)
        tell = self.progress.say if is_first() else distributed.warn
        limit, workers = config.data.max_unreadable, config.data.workers
        self.unreadable = Unreadable(self.plan.train.source, limit, tell)
        in_test = Unreadable(self.plan.test.source, limit, tell)
        train = self.plan.train, workers, self.plan.batch_size, range(self.first_step, self.plan.total_steps)
        test = self.plan.test, workers, self.plan.eval_batch_size, range(self.plan.eval_steps)
        check_shared_memory(shared_memory(*train) + shared_memory(*test))
        self.batches = our_batches(self.unreadable, *train)
        stack.callback(self.batches.close)
        self.test_batches = functools.partial(our_batches, in_test, *test)  # starts an evaluation
        self.attention_log = make_attention_log(self.steps.graphdef, config, self.plan, self.mesh)

    def compile_step(self, batch: Arrays) -> None:
        """Compiles the training step for batches of this kind; says so if it needs more memory than there is."""
        self.progress.say("Compiling the training step, up to a minute the first time ...")
        compiled = self.steps.lower_train(self.state, self.sums, batch).compile()  # kept for the calls
        if caution := memory_caution(compiled, self.mesh.local_devices):
            self.progress.say(f"Caution  {caution}")

    def _take_directory(self, stack: contextlib.ExitStack, *, continues: bool) -> Any:
        """Locks the run directory for this run, and returns the parameters of init_from, or None."""
        config, workdir, start_from = self.config, self.workdir, None
        if config.init_from and not continues:
            phase("reading init_from")
            with together():
                start_from, notes = load_into(config.init_from, self.plan.model, config.seed)
            digest = {"the digest of the weights of init_from": fingerprint(start_from)}
            check_same(digest, "give all processes the same weights")
            say(f"Starting from {'; '.join(notes)}")
        phase(f"taking {workdir}")
        owner = from_first(secrets.token_hex)
        lock, mine = lock_directory(workdir, owner=owner), is_first()
        distributed.first_then_others(lambda: stack.enter_context(lock) if mine else wait_for_owner(workdir, owner))
        shared = several() and config.compilation_cache  # one folder for all processes, see docs/clusters.md
        use_compilation_cache(workdir / "compiled" if shared else config.compilation_cache)
        from_first(lambda: claim_run(workdir, config, self.facts))
        say(describe_run(config, self.facts, workdir))
        return start_from

    def _restore(self) -> dict[str, Any] | None:
        """The tree of the latest checkpoint that can be read, or None if there is none."""
        saved = sorted(from_first(lambda: checkpoint_steps(self.workdir)), reverse=True)
        phase(f"reading the checkpoint of step {saved[0]}" if saved else "making the first weights")
        if saved and saved[0] > self.plan.total_steps:
            raise distributed.Everywhere(
                f"the run in {self.workdir} is at step {saved[0]:,}, beyond its end at {self.plan.total_steps:,}: "
                "raise steps or leave it out, or give another --workdir."
            )
        for step in saved:
            try:
                tree = self.checkpoints.restore(step, self.steps.shapes)
            except Damaged as error:
                if step == saved[-1]:
                    words = "restore a copy, return to the version of the program that wrote it, or move it away."
                    raise distributed.Everywhere(f"{error}: {words}") from error
                say(f"Caution  {error}")
            else:
                self.checkpoints.set_aside([later for later in saved if later > step])
                say(f"{'Continuing' if step < self.plan.total_steps else 'Already finished'} at step {step}")
                return tree
        return None


def use_compilation_cache(folder: str | Path) -> None:
    """Keeps compiled programs in a folder, so that the next start of a run takes seconds; "" keeps none."""
    if folder:
        try:
            path = Path(folder).expanduser()
        except RuntimeError:
            say("There is no home directory: compiled programs and lists of images are not kept.")
            return
        jax.config.update("jax_compilation_cache_dir", str(path))
        compilation_cache.reset_cache()  # otherwise JAX stays with the folder of its first compilation
