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
from collections.abc import Collection, Iterator, Mapping, Sequence
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
SCALES = ("linear", "log", "fraction")
RUN_KEYS = ("row", "column", "config", "overrides", "seeds", "paper")

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
    """A study: what its file says, with one entry in `runs` per training.

    Attributes:
      source: FILE.py:NAME.
      changes: flags for all runs, as "--config.epochs=5".
      paper: the paper's numbers, {(row, column): {"top1": 47.8}}.
      The others are described at the top of this module.
    """

    source: str
    changes: tuple[str, ...]
    title: str
    question: str
    rows: str
    runs: tuple[StudyRun, ...]
    paper: dict[tuple[Name, Name], dict[str, float]]
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

    def row_label(self, row: Name, *, in_figure: bool = False) -> str:
        """Returns a row as it is printed; a figure also says what a number means."""
        if is_number(row):
            return f"{self.rows} {row:g}" if in_figure else f"{row:g}"
        return self.labels.get(row, str(row))

    def column_label(self, column: Name) -> str:
        """Returns a column as it is printed."""
        if is_number(column):
            return f"{100 * column:g}%" if self.scale == "fraction" else f"{column:g}"
        return str(column)

    def has_axis(self) -> bool:
        """Whether the columns are numbers, so that a figure can have them as an axis."""
        return len(self.column_names()) > 1 and all(map(is_number, self.column_names()))


def is_number(value: Any) -> bool:
    """Whether a row or column is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_study(source: str, changes: Sequence[str] = ()) -> Study:
    """Reads a study and loads the config of each run.

    Args:
      source: FILE.py or FILE.py:NAME.
      changes: flags for all runs, as ["--config.data.dir=DIR"].

    Raises:
      UserError: there is no such study, or something in it is wrong.
    """
    if any(re.match(r"--?config\.seed\b", change) for change in changes):
        raise UserError("--config.seed is not possible here: the seeds are in the study's file.")
    given = _call_get_plan(source)
    known = [field.name for field in dataclasses.fields(Study)[2:] if field.name != "paper"]
    _check_keys(f"the plan {source}", given, known, ("title", "question", "rows", "runs"))
    needed = ("row", "config", "seeds", *(["column"] if given.get("columns") else []))
    by_entry, paper = [], {}
    for entry in given.pop("runs"):
        _check_keys(f"a run in the plan {source}", entry, RUN_KEYS, needed)
        by_entry.append(_make_runs(given["rows"], entry, changes))
        paper[entry["row"], entry.get("column")] = entry.get("paper", {})
    # Seed by seed: the whole table is there early, with one seed.
    runs = tuple(run for of_seed in itertools.zip_longest(*by_entry) for run in of_seed if run)
    study = Study(source=source, changes=tuple(changes), runs=runs, paper=paper, **given)
    _check_values(study)
    return study


def _call_get_plan(source: str) -> dict[str, Any]:
    """The dict of a study's file."""
    path, _, name = source.partition(":")
    if not Path(path).is_file():
        files = [f"studies/{file.name}" for file in sorted(ROOT.glob("studies/[!_]*.py"))]
        raise UserError(f"there is no plan {path!r}{nearest(path, files)} The plans are: {', '.join(files)}.")
    try:
        module = runpy.run_path(path)
        return dict(module["get_plan"](*[name] if name else []))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"cannot read the plan {source} ({type(error).__name__}: {error}).") from error


def _check_keys(what: str, given: Mapping[str, Any], known: Sequence[str], needed: Collection[str]) -> None:
    """Raises UserError for the first unknown or missing key."""
    for name in given:
        if name not in known:
            raise UserError(f"{what} sets {name!r}{nearest(name, known)} It may have {', '.join(known)}.")
    for name in needed:
        if name not in given:
            raise UserError(f"{what} lacks {name!r}. It must have {', '.join(needed)}.")


def _check_values(study: Study) -> None:
    """Raises UserError for values that contradict each other."""
    for what, values, choices in (
        ("metric", study.metrics, tuple(METRICS)),
        ("scale", [study.scale], SCALES),
        ("baseline", [study.baseline], [None, *study.row_names()]),
    ):
        for value in values:
            if value not in choices:
                known = ", ".join(str(choice) for choice in choices)
                raise UserError(f"the plan {study.source} has the {what} {value!r}: choose from {known}.")
    names: set[str] = set()
    for run in study.runs:
        if run.name in names:
            raise UserError(f"the plan {study.source} has two runs {run.name}: list each row and column once.")
        names.add(run.name)
        if study.columns and study.scale != "linear" and not (is_number(run.column) and run.column > 0):
            raise UserError(
                f"the plan {study.source} has the scale {study.scale!r} and the column {run.column!r}: "
                'use numbers above 0, or leave out "scale".'
            )


def _make_runs(rows: str, entry: Mapping[str, Any], changes: Sequence[str]) -> list[StudyRun]:
    """The runs of one entry, one per seed."""
    runs = []
    overrides = [f"--config.{field}={value}" for field, value in entry.get("overrides", {}).items()]
    for seed in entry["seeds"]:
        row, column = entry["row"], entry.get("column")
        parts = [*([rows] if is_number(row) else []), row, column, f"seed{seed}"]
        words = [f"{part:g}" if is_number(part) else part for part in parts if part is not None]
        name = "-".join(re.sub(r"[^\w.+]+", "-", word).strip("-").lower() for word in words)
        flags = (f"--config={entry['config']}", *overrides, *changes, f"--config.seed={seed}")
        with _named_errors(name):
            runs.append(StudyRun(name, row, column, seed, flags, load_config(flags)))
    return runs


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
    seen: set[str] = set()

    def is_new(*what: Any) -> bool:
        """Whether a check is new: runs share data, models and teachers."""
        before = len(seen)
        seen.add(str(what))
        return len(seen) > before

    for run in study.runs:
        config, flat = run.config, flatten(run.config)
        with _named_errors(run.name):
            check_run(config, devices=1)
            model_settings(**model_arguments(config, config.data.num_classes or 1000))
            if config.init_from and is_new(config.init_from):
                fetch(config.init_from)
            data = str([(name, flat[name]) for name in flat if name.startswith("data.") or "num_classes" in name])
            if data not in plans:
                plans[data] = make_plan(config, devices=1)
            model = model_settings(**model_arguments(config, plans[data].model["num_classes"]))
            if config.optim.frozen and is_new(model, config.optim.frozen):
                frozen_mask(abstract_model(model)[1], config.optim.frozen)
            inputs = [model[name] for name in ("image_size", "in_chans", "num_classes")]
            if config.distill.teacher and is_new(config.distill.teacher, data, inputs):
                load_teacher(config, dataclasses.replace(plans[data], model=model))


@contextlib.contextmanager
def _named_errors(run: str) -> Iterator[None]:
    """Adds the run to the message of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"run {run}: {error}") from error
