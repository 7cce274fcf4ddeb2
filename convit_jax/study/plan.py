"""Studies: which runs a table or figure needs, read from a short Python file and checked before the first.

The file (studies/digits.py) has get_plan(), or get_plan(name) for FILE.py:NAME. It returns a dict:

  title, question    what is compared, and which table or figure of the paper it is
  rows, columns      meaning of the table's rows and columns, as "model" and "fraction of each class"
  scale              of columns that are numbers: "linear", "log", or "fraction" (logarithmic, in per cent)
  runs               dicts of row, column, config (a file), overrides {"optim.lr": 1e-3}, seeds, and the
                     paper's numbers, {"top1": 47.8}
  labels             longer names of rows for the table
  baseline           the row with which the others are compared (Table 2)
  metrics            of "top1", "top5", "loss": a table each, a figure of the first; ["top1"] by default

title, question, rows and runs are required; row, config and seeds in a run.
"""

import contextlib
import dataclasses
import itertools
import re
import runpy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from convit_jax.config import ROOT, flatten, load_config, may_change
from convit_jax.errors import UserError, nearest
from convit_jax.models.variants import abstract_model, model_settings
from convit_jax.training.distill import load_teacher
from convit_jax.training.optimizer import frozen_mask
from convit_jax.training.plan import Plan, check_run, make_plan, model_arguments
from convit_jax.weights.hub import fetch

METRICS = {"top1": "top-1 (%)", "top5": "top-5 (%)", "loss": "loss"}

Name = Any  # of a row or column: a string or a number; None: the study has no columns


@dataclasses.dataclass(frozen=True)
class StudyRun:
    """One training of a study: its cell of the table and the flags of train.py."""

    name: str
    row: Name
    column: Name
    seed: int
    flags: tuple[str, ...]
    config: ConfigDict


@dataclasses.dataclass(frozen=True)
class Study:
    """A study as its file describes it (top of this module), with one entry in `runs` per training."""

    source: str  # FILE.py:NAME
    changes: tuple[str, ...]  # flags for all runs, as "--config.epochs=5"
    runs: tuple[StudyRun, ...]
    paper: dict[tuple[Name, Name], dict[str, float]]  # the paper's numbers, {(row, column): {"top1": 47.8}}
    title: str
    question: str
    rows: str
    columns: str | None = None
    scale: str = "linear"
    labels: dict[Name, str] = dataclasses.field(default_factory=dict)
    baseline: Name = None
    metrics: Sequence[str] = ("top1",)

    def row_names(self) -> list[Name]:
        """Returns the rows in the order of the file."""
        return list(dict.fromkeys(run.row for run in self.runs))

    def column_names(self) -> list[Name]:
        """Returns the columns in the order of the file."""
        return list(dict.fromkeys(run.column for run in self.runs))

    def row_label(self, row: Name) -> str:
        """Returns a row as it is printed."""
        return self.labels.get(row, f"{row:g}" if is_number(row) else str(row))

    def column_label(self, column: Name) -> str:
        """Returns a column as it is printed."""
        if self.scale == "fraction":
            return f"{100 * column:g}%"
        return f"{column:g}" if is_number(column) else str(column)


def is_number(value: Any) -> bool:
    """Whether a row or column is a number."""
    return isinstance(value, int | float)


def read_study(source: str, changes: Sequence[str] = ()) -> Study:
    """Reads a study, FILE.py or FILE.py:NAME, and loads the config of each run.

    Raises:
      UserError: there is no such study, or something in it is wrong.
    """
    if any(re.match(r"--?config\.seed\b", change) for change in changes):
        raise UserError("--config.seed is not possible here: the seeds are in the study's file.")
    path, _, name = source.partition(":")
    if not Path(path).is_file():
        files = [f"studies/{file.name}" for file in sorted(ROOT.glob("studies/[!_]*.py"))]
        raise UserError(f"there is no plan {path!r}{nearest(path, files)} The plans are: {', '.join(files)}.")
    try:
        plan = dict(runpy.run_path(path)["get_plan"](*[name] if name else []))
        entries = plan.pop("runs")
        by_entry = [_expand_run(plan["rows"], changes, **entry) for entry in entries]
        paper = {(entry["row"], entry.get("column")): entry.get("paper", {}) for entry in entries}
        # Seed by seed: the whole table is there early, with one seed.
        runs = tuple(run for of_seed in itertools.zip_longest(*by_entry) for run in of_seed if run)
        study = Study(source=source, changes=tuple(changes), runs=runs, paper=paper, **plan)
    except UserError:
        raise
    except Exception as error:  # of any kind: the file is the user's code
        raise UserError(
            f"cannot read the plan {source} ({type(error).__name__}: {error}): convit_jax/study/plan.py lists all keys."
        ) from error
    _check_choices(study)
    return study


def _expand_run(
    rows: str,
    changes: Sequence[str],
    *,
    row: Name,
    config: str,
    seeds: Sequence[int],
    column: Name = None,
    overrides: Mapping[str, Any] | None = None,
    paper: Mapping[str, float] | None = None,
) -> list[StudyRun]:
    """The runs of one entry of a study's file, one per seed."""
    words = [rows] if is_number(row) else []
    words += [f"{part:g}" if is_number(part) else part for part in (row, column) if part is not None]
    start = "-".join(re.sub(r"[^\w.+]+", "-", word).strip("-").lower() for word in words)
    runs = []
    for seed in seeds:
        flags = [f"--config={config}", *(f"--config.{field}={value}" for field, value in (overrides or {}).items())]
        flags += [*changes, f"--config.seed={seed}"]
        name = f"{start}-seed{seed}"
        with _named_errors(name):
            runs.append(StudyRun(name, row, column, seed, tuple(flags), load_config(flags)))
    return runs


def _check_choices(study: Study) -> None:
    choices: tuple[tuple[str, Sequence[Name], Sequence[Name]], ...] = (
        ("metric", study.metrics, list(METRICS)),
        ("scale", [study.scale], ["linear", "log", "fraction"]),
        ("baseline", [study.baseline], [None, *study.row_names()]),
    )
    for what, values, known in choices:
        for value in values:
            if value not in known:
                raise UserError(f"the plan {study.source} has the {what} {value!r}: choose from {known}.")
    if study.scale != "linear" and not all(is_number(run.column) and run.column > 0 for run in study.runs):
        raise UserError(f"the plan {study.source} has the scale {study.scale!r}: all columns must be numbers above 0.")
    names = [run.name for run in study.runs]
    for name in set(names):
        if names.count(name) > 1:
            raise UserError(f"the plan {study.source} has two runs {name}: list each row and column once.")


def run_identity(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """Returns the flat fields of a config that make a run of a study; others may differ between machines."""
    free = may_change() - {"steps", "distill.teacher"}
    return {name: value for name, value in flatten(config).items() if name not in free}


def check_study(study: Study) -> None:
    """Checks configs, models, data and weights of all runs, which takes seconds and may save hours.

    Raises:
      UserError: names the first run that cannot work.
    """
    plans: dict[str, Plan] = {}
    checked: set[str] = set()
    for run in study.runs:
        config, flat = run.config, flatten(run.config)
        with _named_errors(run.name):
            check_run(config, devices=1)
            data = str([(name, flat[name]) for name in flat if name.startswith("data.") or "num_classes" in name])
            if data not in plans:
                plans[data] = make_plan(config, devices=1)
            model = model_settings(**model_arguments(config, plans[data].model["num_classes"]))
            weights = str((data, model, config.init_from, config.optim.frozen, config.distill.teacher))
            if weights not in checked:
                checked.add(weights)
                if config.init_from:
                    fetch(config.init_from)
                if config.optim.frozen:
                    frozen_mask(abstract_model(model)[1], config.optim.frozen)
                if config.distill.teacher:
                    load_teacher(config, dataclasses.replace(plans[data], model=model))


@contextlib.contextmanager
def _named_errors(run: str) -> Iterator[None]:
    """Adds the run to the message of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"run {run}: {error}") from error
