"""Studies: which runs a table or figure needs, read from a short Python file and checked before the first.

The file (studies/digits.py) has get_plan(), or get_plan(name) for FILE.py:NAME. It returns a dict of the fields of
`Study` from `title` on, and `runs`: a list of dicts with the arguments of `_expand_entry` from `row` on.
"""

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from convit_jax.config import flatten, load_config, run_file
from convit_jax.errors import UserError, nearest

METRICS = {"top1": "top-1 (%)", "top5": "top-5 (%)", "loss": "loss"}

Name = Any  # of a row or column: a string or a number; None: the study has no columns


@dataclasses.dataclass(frozen=True)
class StudyRun:
    """One training of a study: its cell of the table and the flags of train.py."""

    name: str
    row: Name
    column: Name
    seed: int
    paper: Mapping[str, float]  # the paper's numbers for the cell, as {"top1": 47.8}
    flags: tuple[str, ...]
    config: ConfigDict


@dataclasses.dataclass(frozen=True)
class Study:
    """A study: its trainings, and how to show their results."""

    source: str  # FILE.py:NAME
    changes: tuple[str, ...]  # flags for all runs, as "--config.epochs=5"
    runs: tuple[StudyRun, ...]
    title: str
    question: str  # what is compared, and which table or figure of the paper it is
    rows: str  # what a row of the table is, as "model"
    columns: str | None = None  # what a column is, as "fraction of each class"
    scale: str = "linear"  # of columns that are numbers: or "log", or "fraction" (logarithmic, in per cent)
    labels: Mapping[Name, str] = dataclasses.field(default_factory=dict)  # longer names of rows for the table
    baseline: Name = None  # the row with which the others are compared (Table 2)
    metrics: Sequence[str] = ("top1",)  # of METRICS: a table each, a figure of the first

    def __post_init__(self) -> None:
        """Raises ValueError if the table could not be made."""
        for what, values, known in (
            ("metrics", self.metrics, list(METRICS)),
            ("scale", [self.scale], ["linear", "log", "fraction"]),
            ("baseline", [self.baseline], [None, *self.row_names()]),
        ):
            if not set(values) <= set(known):
                raise ValueError(f"{what} {values}: choose from {known}")
        if len({run.name for run in self.runs}) < len(self.runs):
            raise ValueError("two runs have the same row, column and seed")

    def row_names(self) -> list[Name]:
        """Returns the rows in the order of the file."""
        return list(dict.fromkeys(run.row for run in self.runs))

    def column_names(self) -> list[Name]:
        """Returns the columns in the order of the file."""
        return list(dict.fromkeys(run.column for run in self.runs))

    def row_label(self, row: Name) -> str:
        """Returns a row as it is printed."""
        return self.labels.get(row, _text(row))

    def column_label(self, column: Name) -> str:
        """Returns a column as it is printed."""
        return f"{100 * column:g}%" if self.scale == "fraction" and is_number(column) else _text(column)


def is_number(value: Name) -> bool:
    """Whether a row or column is a number."""
    return isinstance(value, int | float)


def _text(value: Name) -> str:
    return f"{value:g}" if is_number(value) else str(value)


def read_study(source: str, changes: Sequence[str] = ()) -> Study:
    """Reads a study, FILE.py or FILE.py:NAME, and the config of each run; UserError for a mistake in it."""
    if any(re.match(r"--?config\.seed\b", change) for change in changes):
        raise UserError("--config.seed is not possible here: the seeds are in the study's file.")
    path, _, name = source.partition(":")
    try:
        plan = dict(run_file(path, "studies")["get_plan"](*[name] if name else []))
        by_entry = [_expand_entry(plan["rows"], changes, **entry) for entry in plan.pop("runs")]
        # Seed by seed: the whole table is there early, with one seed.
        runs = tuple(run for of_seed in itertools.zip_longest(*by_entry) for run in of_seed if run)
        return Study(source, tuple(changes), runs, **plan)
    except UserError:
        raise
    except Exception as error:  # of any kind: the file is the user's code
        raise UserError(
            f"cannot read the plan {source} ({type(error).__name__}: {error}): convit_jax/study/plan.py lists all keys."
        ) from error


def _expand_entry(
    rows: str,
    changes: Sequence[str],
    *,
    row: Name,
    column: Name = None,
    config: str,  # a file
    overrides: Mapping[str, Any] | None = None,  # as {"optim.lr": 1e-3}
    seeds: Sequence[int],
    paper: Mapping[str, float] | None = None,
) -> list[StudyRun]:
    """The runs of one entry of a study's file, one per seed."""
    words = [rows] if is_number(row) else []
    words += [_text(part) for part in (row, column) if part is not None]
    start = "-".join(re.sub(r"[^\w.+]+", "-", word).strip("-").lower() for word in words)
    fields = [f"--config.{field}={value}" for field, value in (overrides or {}).items()]
    runs = []
    for seed in seeds:
        flags = (f"--config={config}", *fields, *changes, f"--config.seed={seed}")
        runs.append(StudyRun(f"{start}-seed{seed}", row, column, seed, paper or {}, flags, load_config(flags)))
    return runs


def select_runs(study: Study, **wanted: Sequence[str] | None) -> list[StudyRun]:
    """Returns the runs whose "row", "column" and "seed" are among the wanted texts; None takes all of them."""
    selected = list(study.runs)
    for what, names in wanted.items():
        known = dict.fromkeys(_text(getattr(run, what)) for run in study.runs)
        for name in names or []:
            if name not in known:
                choices = f"The {what}s are: {', '.join(known)}."
                raise UserError(f"the study has no {what} {name!r}{nearest(name, known)} {choices}")
        selected = [run for run in selected if names is None or _text(getattr(run, what)) in names]
    if not selected:
        raise UserError("the study has no run with these rows, columns and seeds: see --list.")
    return selected


def check_runs(runs: Sequence[StudyRun]) -> None:
    """Checks configs, models, data and weights of runs, in seconds; UserError names a run that cannot work."""
    from convit_jax.models.variants import abstract_model
    from convit_jax.training.distill import load_teacher
    from convit_jax.training.optimizer import count_trained
    from convit_jax.training.plan import follow_weights, make_plan
    from convit_jax.weights.hub import fetch

    different = {str(flatten(run.config) | {"seed": None}): run for run in reversed(runs)}
    for run in different.values():
        try:
            config = follow_weights(run.config)
            plan = make_plan(config, devices=1)
            if config.init_from:
                fetch(config.init_from)
            if config.optim.frozen:  # otherwise the head is trained; the shapes take 0.6 s
                count_trained(abstract_model(plan.model)[1], config.optim)
            load_teacher(config, plan)
        except UserError as error:
            raise UserError(f"run {run.name}: {error}") from error
