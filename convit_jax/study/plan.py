"""A plan: which runs a study is made of, read from a short Python file and checked before the first one.

The file (studies/digits.py) has get_plan(), or get_plan(name) for PLAN.py:NAME, which returns a dict:

  title, question    what is compared, and which table or figure of the paper that is
  rows, columns      what the rows and the columns of the table are, as "model" and "fraction of each
                     class"; without columns there is one
  scale              of columns that are numbers: "linear", "log", or "fraction", which is "log" in per cent
  runs               dicts of row, column, config (a file), overrides {"optim.lr": 1e-3}, seeds, and the
                     paper's own numbers, {"top1": 47.8}
  labels             of rows, where a row's name should be longer in the table; may be left out
  baseline           the row to which the others' relative gap is given (Table 2); may be left out
  metrics            of "top1", "top5", "loss": a table each, a figure of the first; by default top1
"""

import collections
import contextlib
import dataclasses
import importlib.util
import itertools
import os
import re
from pathlib import Path

from ml_collections import ConfigDict

from convit_jax.config import ROOT, flatten, load_config, may_change
from convit_jax.errors import UserError, nearest
from convit_jax.models.variants import abstract_model, count_macs, model_settings
from convit_jax.training.distill import load_teacher
from convit_jax.training.optimizer import frozen_mask
from convit_jax.training.plan import check_run, make_plan, model_arguments
from convit_jax.weights.pretrained import fetch

FREE = may_change() - {"steps", "distill.teacher"}  # what makes no config another run
NEEDED = ("title", "question", "rows", "runs")
OPTIONAL = {"columns": None, "scale": "linear", "labels": {}, "baseline": None, "metrics": ("top1",)}
OF_A_RUN = ("row", "column", "config", "overrides", "seeds", "paper")
SCALES = ("linear", "log", "fraction")
METRICS = {"top1": "top-1 (%)", "top5": "top-5 (%)", "loss": "loss"}
LENGTH = ("epochs", "steps", "batch_size", "eval_every", "eval_batch_size", "model.num_classes")


@dataclasses.dataclass(frozen=True)
class Run:
    """One training: its cell of the table, and what train.py is given for it."""

    name: str
    row: object
    column: object
    seed: int
    flags: tuple
    config: ConfigDict


@dataclasses.dataclass(frozen=True)
class Plan:
    """A study: the dict of get_plan() with its runs written out, and what the user changed in all of them."""

    source: str
    changes: tuple
    title: str
    question: str
    rows: str
    columns: str | None
    scale: str
    labels: dict
    baseline: object
    metrics: tuple
    runs: tuple
    paper: dict  # {(row, column): {"top1": 47.8}}

    def row_names(self):
        """In the order of the plan."""
        return list(dict.fromkeys(run.row for run in self.runs))

    def column_names(self):
        """In the order of the plan."""
        return list(dict.fromkeys(run.column for run in self.runs))

    def label(self, row, long=False):
        """The row as it is printed; long: a number says of what it is."""
        if _number(row):
            return f"{self.rows} {row:g}" if long else f"{row:g}"
        return self.labels.get(row, row)

    def numeric(self):
        """Whether the columns are numbers, so that they can be an axis."""
        return len(self.column_names()) > 1 and all(map(_number, self.column_names()))

    def column_label(self, column):
        """The column as it is printed."""
        if self.scale == "fraction":
            return f"{100 * column:g}%"
        return f"{column:g}" if _number(column) else str(column)


def read_plan(source, changes):
    """Read PLAN.py or PLAN.py:NAME, write out its runs and load the config of each.

    Args:
      changes: flags for all runs, as ["--config.data.dir=DIR"].

    Raises:
      UserError: no such plan, or something in it that cannot be, named with its run.
    """
    given = _get_plan(source)
    if not isinstance(given, dict):
        raise UserError(f"get_plan() of the plan {source} returns no dict, but {type(given).__name__}.")
    unknown = [name for name in given if name not in (*NEEDED, *OPTIONAL)]
    missing = [name for name in NEEDED if name not in given]
    if unknown or missing:
        known = (*NEEDED, *OPTIONAL)
        what = f"sets {unknown[0]!r}{nearest(unknown[0], known)}" if unknown else f"lacks {missing[0]!r}."
        raise UserError(f"the plan {source} {what} A plan has {', '.join(known)}.")
    filled = {**OPTIONAL, **given}
    for metric in filled["metrics"]:
        if metric not in METRICS:
            raise UserError(f"the plan {source} has the metric {metric!r}: choose of {', '.join(METRICS)}.")
    if filled["scale"] not in SCALES:
        raise UserError(
            f"the plan {source} has the scale {filled['scale']!r}: choose of {', '.join(SCALES)}."
        )
    runs, paper = [], {}
    for entry in filled.pop("runs"):
        runs.append(_runs(source, filled, entry, _changed(changes)))
        paper[entry.get("row"), entry.get("column")] = entry.get("paper", {})
    # Seed by seed, so that the whole table is there early, if only of one seed.
    runs = [run for of_seed in itertools.zip_longest(*runs) for run in of_seed if run]
    twice = [name for name, count in collections.Counter(run.name for run in runs).items() if count > 1]
    if twice:
        raise UserError(f"the plan {source} has two runs {twice[0]}: give each row, column and seed once.")
    if filled["columns"] is not None and filled["scale"] != "linear":
        for run in runs:
            if not _number(run.column) or run.column <= 0:
                raise UserError(
                    f"the plan {source} has the scale {filled['scale']!r} and the column {run.column!r}: "
                    'it takes numbers above 0, or leave "scale" out.'
                )
    baseline = filled["baseline"]
    if baseline is not None and baseline not in {run.row for run in runs}:
        raise UserError(f"the plan {source} has the baseline {baseline!r}, which is none of its rows.")
    return Plan(source=source, changes=tuple(changes), runs=tuple(runs), paper=paper, **filled)


def check(plan):
    """Refuse configs, models, data and weights that cannot be, before the first run.

    Returns:
      {name of the run: its work}, images shown x multiply-accumulates of one.

    Raises:
      UserError: names the run.
    """
    plans, work, met = {}, {}, set()

    def new(*what):
        """Whether this was not met yet: runs share their data, their models and their teacher."""
        known = str(what) in met
        met.add(str(what))
        return not known

    for run in plan.runs:
        config, fields = run.config, flatten(run.config)
        with _of_run(run.name):
            check_run(config, devices=1)
            macs = count_macs(_model(config))
            if config.init_from and new(config.init_from):
                fetch(config.init_from)
            # Runs that differ in other fields, as the seed, have as many images: data is read once for them.
            key = str([item for item in fields.items() if item[0] in LENGTH or item[0].startswith("data.")])
            if key not in plans:
                plans[key] = make_plan(config, devices=1)
            model = model_settings(**model_arguments(config, plans[key].model["num_classes"]))
            if config.optim.frozen and new(model, config.optim.frozen):
                frozen_mask(abstract_model(model)[1], config.optim.frozen)
            inputs = [model[name] for name in ("image_size", "in_chans", "num_classes")]
            teacher = config.distill.teacher
            if teacher and new(teacher, config.data.name, config.data.dir, inputs):
                load_teacher(config, dataclasses.replace(plans[key], model=model))
        work[run.name] = plans[key].total_steps * plans[key].batch_size * macs
    return work


def identity(config):
    """The fields that make a config another run, {"optim.lr": 0.0005, ...}; others may differ by machine."""
    return {name: value for name, value in flatten(config).items() if name not in FREE}


def _get_plan(source):
    """The dict of a plan's file."""
    path, _, name = source.partition(":")
    if not Path(path).is_file():
        files = [f"studies/{file.name}" for file in sorted(ROOT.glob("studies/[!_]*.py"))]
        raise UserError(f"there is no plan {path!r}{nearest(path, files)} The plans are: {', '.join(files)}.")
    spec = importlib.util.spec_from_file_location("plan", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return module.get_plan(*[name] if name else [])
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the plan {source} cannot be read ({type(error).__name__}: {error}).") from error


def _changed(changes):
    """{"data.dir": "DIR"} of ["--config.data.dir=DIR"]."""
    changed = {}
    for change in changes:
        match = re.fullmatch(r"--?config\.([\w.]+)=(.*)", change)
        if match is None:
            raise UserError(f"{change!r} changes nothing: write --config.FIELD=VALUE.")
        changed[match[1]] = match[2]
    if "seed" in changed:
        raise UserError("--config.seed cannot be given: the seeds of a study are in its plan.")
    return changed


def _runs(source, plan, entry, changed):
    """The Runs of one entry of a plan, one a seed. plan: the dict of get_plan()."""
    needed = ("row", "config", "seeds") if plan["columns"] is None else ("row", "column", "config", "seeds")
    unknown = [name for name in entry if name not in OF_A_RUN]
    missing = [name for name in needed if name not in entry]
    if unknown or missing:
        what = f"sets {unknown[0]!r}{nearest(unknown[0], OF_A_RUN)}" if unknown else f"lacks {missing[0]!r}."
        raise UserError(f"a run in the plan {source} {what} A run has {', '.join(OF_A_RUN)}.")
    runs = []
    for seed in entry["seeds"]:
        of_row = [plan["rows"]] if _number(entry["row"]) else []
        parts = [*of_row, entry["row"], entry.get("column"), f"seed{seed}"]
        words = [f"{part:g}" if _number(part) else part for part in parts if part is not None]
        name = "-".join(re.sub(r"[^\w.+]+", "-", word).strip("-").lower() for word in words)
        overrides = {**entry.get("overrides", {}), **changed, "seed": seed}
        file = entry["config"]
        if not Path(file.partition(":")[0]).exists():
            file = os.path.relpath(ROOT / file)
        flags = (f"--config={file}", *(f"--config.{field}={value}" for field, value in overrides.items()))
        with _of_run(name):
            config = load_config(flags)
        runs.append(Run(name, entry["row"], entry.get("column"), seed, flags, config))
    return runs


def _model(config):
    """model_settings() of a config whose number of classes is not known yet."""
    return model_settings(**model_arguments(config, config.data.num_classes or 1000))


@contextlib.contextmanager
def _of_run(name):
    """Says of which run a UserError is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"run {name}: {error}") from error


def _number(value):
    return isinstance(value, int | float) and not isinstance(value, bool)
