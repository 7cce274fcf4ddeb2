"""Configs: declared fields, config files, command-line overrides, checks and comparisons.

configs/default.py declares every field once, as a `Field` with its default, meaning and allowed values. A
config is an ml_collections.ConfigDict with these fields. Config files change some of them, flags such as
--config.optim.lr=1e-3 change others.
"""

import dataclasses
import json
import os
import re
import runpy
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, FieldReference, config_flags

from convit_jax.errors import UserError, explained, nearest

INSTALLED = Path(__file__).parent / "recipes"
ROOT = INSTALLED if INSTALLED.is_dir() else Path(__file__).parents[1]  # has train.py, configs/ and studies/


@dataclasses.dataclass(frozen=True)
class Field:
    """A config field."""

    default: Any  # of the paper's recipe; None leaves the choice to the program
    meaning: str
    allowed: str | tuple[str, ...] = ""  # an interval such as "[0, 1)", for each number of a tuple, or the choices
    _: dataclasses.KW_ONLY
    kind: type | None = None  # type of the values, if the default does not tell it
    may_change: bool = False  # whether a run may continue with another value: no step changes but by rounding


def _inside(value: float, interval: str) -> bool:
    """Whether a number is in an interval such as "(0, 1]"; NaN is in none."""
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    return low < value < high or (interval[0] == "[" and value == low) or (interval[-1] == "]" and value == high)


def make_config(fields: Mapping[str, Field]) -> ConfigDict:
    """Returns the ConfigDict of declared fields, named such as "optim.lr", at their defaults."""
    config: dict[str, Any] = {}
    for name, field in fields.items():
        section, _, last = name.rpartition(".")
        value = FieldReference(field.default, field_type=field.kind) if field.kind else field.default
        (config.setdefault(section, {}) if section else config)[last] = value
    return ConfigDict(config)


def declared_fields() -> dict[str, Field]:
    """Returns the fields of configs/default.py."""
    _import_from_root()
    from configs import default

    return default.FIELDS


def default_config() -> ConfigDict:
    """Returns the config of configs/default.py."""
    return make_config(declared_fields())


def _import_from_root() -> None:
    """Lets config files and plans import each other, from any working directory."""
    if sys.path[0] != str(ROOT):
        sys.path.insert(0, str(ROOT))


def run_file(path: str, folder: str) -> dict[str, Any]:
    """Returns the globals of a Python file: a path, from here or from ROOT, or the bare name of a file in ROOT/folder.

    Raises UserError if there is no such file.
    """
    file = next((each for each in (Path(path), ROOT / path, ROOT / folder / f"{path}.py") if each.is_file()), None)
    if file is None:
        files = sorted(f"{folder}/{each.name}" for each in (ROOT / folder).glob("[!_]*.py"))
        hint = nearest(path, [*files, *(Path(each).stem for each in files)])
        raise UserError(f"there is no file {path!r}{hint} The files are: {', '.join(files)}.")
    _import_from_root()
    return runpy.run_path(str(file))


def load_config_file(source: str) -> ConfigDict:
    """Returns get_config() of FILE.py, or get_config(ROW) of FILE.py:ROW; UserError if a field is wrong or missing."""
    path, _, row = source.partition(":")
    config = run_file(path, "configs")["get_config"](*[row] if row else [])
    known, names = declared_fields(), flatten(config)
    _check_names(names, f"the config file {path} sets")
    if missing := [name for name in known if name not in names]:
        raise UserError(f"the config file {path} lacks {missing[0]!r}: start from default.get_config().")
    return config


def is_run(path: str | os.PathLike[str] | None) -> bool:
    """Whether a path is a run directory."""
    return bool(path) and (Path(str(path)).expanduser() / "checkpoints").is_dir()


def load_run_config(directory: Path) -> ConfigDict:
    """Returns the config of a run directory, on all local devices, whatever the run was trained on."""
    file = directory / "config.json"
    with explained(file):
        saved = flatten(json.loads(file.read_text()))
    fields = {**declared_fields()}
    for name, value in {**saved, "mesh.data": -1, "mesh.fsdp": 1}.items():
        kind = fields[name].kind if name in fields else None
        value = tuple(value) if isinstance(value, list) else value
        fields[name] = Field(value, "", kind=kind or (object if value is None else None))
    return make_config(fields)


def take_option(argv: Sequence[str], name: str) -> tuple[str | None, list[str]]:
    """Returns the value of --name=VALUE or --name VALUE in a command line, or None, and the line without it."""
    values = flags.FlagValues()
    flags.DEFINE_string(name, None, "", flag_values=values)
    rest = values(argv, known_only=True)
    return values[name].value, rest


def take_config(argv: Sequence[str], default: str | None = None) -> tuple[ConfigDict | None, list[str]]:
    """Returns the config of --config=SOURCE, else the default's, with all --config.FIELD=VALUE; and the line without.

    SOURCE is a config file or a run directory. Without any config the line keeps its --config.FIELD.
    """
    given, rest = take_option(argv, "config")
    found = [re.match(r"--?config\.([^=]+)", argument) for argument in rest]
    _check_names([match[1] for match in found if match], "the config has no field")
    source = default if given is None else given
    if source is None:
        return None, rest
    config = load_run_config(Path(source).expanduser()) if is_run(source) else load_config_file(source)
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=rest)
    rest = values(rest, known_only=True)
    return values["config"].value, rest


def load_config(arguments: Sequence[str]) -> ConfigDict:
    """Returns the config of ["--config=configs/digits.py", "--config.epochs=5"]; UserError as train.py reports it."""
    try:
        config, rest = take_config(["", *arguments])
        if config is None:
            raise UserError("there is no config: add --config=FILE.")
        flags.FlagValues()(rest)  # there are no other flags
    except flags.Error as error:
        raise UserError(str(error).strip()) from error
    return config


def _check_names(names: Iterable[str], words: str) -> None:
    known = declared_fields()
    for name in names:
        if name not in known:
            inside = [each for each in known if each.endswith(f".{name}")]
            hint = f", did you mean {inside[0]!r}?" if inside else nearest(name, known)
            raise UserError(f"{words} {name!r}{hint} configs/default.py explains all fields.")


def check_config(config: ConfigDict) -> None:
    """Raises UserError for the first field whose value is not allowed."""
    flat = flatten(config)
    for name, field in declared_fields().items():
        if (value := flat.get(name)) is None or not field.allowed:
            continue
        value = tuple(value) if isinstance(value, list) else value
        if isinstance(field.allowed, tuple):
            if value not in field.allowed:
                hint = nearest(str(value), field.allowed)
                raise UserError(f"{name} is {value!r}{hint} Choose from: {', '.join(field.allowed)}.")
        elif not all(_inside(each, field.allowed) for each in (value if isinstance(value, tuple) else [value])):
            raise UserError(f"{name} is {value} ({field.meaning}): it must be in {field.allowed}.")


def flatten(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """Returns {"optim.lr": 0.0005, ...}, with values as JSON gives them back (lists, not tuples)."""
    if isinstance(config, ConfigDict):
        config = json.loads(config.to_json_best_effort())
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def left_to_weights(config: ConfigDict) -> list[str]:
    """Returns the names of the fields that are None and therefore as in the weights of init_from."""
    names = [f"model.{name}" for name in config.model] if config.model.name is None else []
    names += [f"data.{name}" for name in ("crop_ratio", "interpolation", "mean", "std")]
    flat = flatten(config)
    return [name for name in names if flat[name] is None]


def may_change() -> frozenset[str]:
    """Returns the names of fields that may differ when a run continues."""
    return frozenset(name for name, field in declared_fields().items() if field.may_change)


def compare_configs(now: Mapping[str, Any], then: Mapping[str, Any], ignored: Collection[str]) -> list[str]:
    """Returns ["optim.lr was 0.1, is 0.2", ...] of two flat configs.

    `then` may be from older code: fields that it lacks had their default value.
    """
    then = {**{name: value for name, value in flatten(default_config()).items() if name in now}, **then}
    return [
        f"{name} was {then.get(name)!r}, is {now.get(name)!r}"
        for name in sorted({*now, *then})
        if now.get(name) != then.get(name) and name not in ignored
    ]
