"""The arguments of `crosscode.train`, as far as they can be checked without torch."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from crosscode.config.experiment import ExperimentConfig, TrainConfig
from crosscode.errors import InputError

_SET_BY_DATA = ("language_models", "hookpoints", "crosscoder", "run_dir")
TRAIN_FIELDS = tuple(TrainConfig.model_fields)
TOP_FIELDS = tuple(name for name in ExperimentConfig.model_fields if name not in _SET_BY_DATA)


def sorted_fields(fields: Mapping[str, Any], own: tuple[str, ...]) -> dict[str, Any]:
    """Keywords as they stand in a config: fields of `train` in their section.

    Args:
        own: names of other arguments, for the hint.

    Raises:
        InputError: a name that is neither a field of `train` nor one of a whole config; one that is given twice.
    """
    values = {name: _plain(value) for name, value in fields.items() if name in TOP_FIELDS}
    train = dict(values.get("train") or {})
    for name, value in fields.items():
        if name in TOP_FIELDS:
            continue
        if name not in TRAIN_FIELDS:
            near = get_close_matches(name, (*TRAIN_FIELDS, *TOP_FIELDS, *own), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            known = f"fields of train ({', '.join(TRAIN_FIELDS)}) and of a config ({', '.join(TOP_FIELDS)})"
            raise InputError(f"train: unknown argument {name!r}{hint or f'; there are {known}'}")
        if value is None and TrainConfig.model_fields[name].is_required():
            continue  # as the signature shows it
        if name in train:
            raise InputError(f"train: {name!r} is given twice: by itself and in `train`")
        train[name] = _plain(value)
    return values | ({"train": train} if train else {})


def train_signature(function: Callable[..., Any]) -> inspect.Signature:
    """That of `crosscode.train` with the fields of `train` in place of `**fields`, none of which must be given."""
    own = list(inspect.signature(function).parameters.values())
    fields = inspect.signature(TrainConfig).parameters.values()
    named = [one.replace(default=None) if one.default is one.empty else one for one in fields]
    return inspect.Signature([*own[:-1], *named, own[-1]])


def name_for(run_dir: str | Path | None) -> dict[str, str]:
    """The run's name and folder, if it has a folder: the name is that of the folder, where it can be one."""
    if run_dir is None:
        return {}
    name = Path(run_dir).name
    named = {"name": name} if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) else {}
    return {"run_dir": str(run_dir), **named}


def _plain(value: Any) -> Any:
    """As YAML has it: of a config its fields, of a path its text."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, PathLike):
        return fspath(value)
    return value.model_dump() if isinstance(value, BaseModel) else value
