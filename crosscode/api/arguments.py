"""The arguments of `crosscode.train`, as far as they can be checked without torch."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from crosscode.config.checked import field_paths
from crosscode.config.experiment import ExperimentConfig, TrainConfig
from crosscode.config.hints import component_fields, likely_fields
from crosscode.config.reading import is_config
from crosscode.errors import InputError, short

_OF_HARVEST = ("language_models", "hookpoints")
TRAIN_FIELDS = tuple(TrainConfig.model_fields)
TOP_FIELDS = tuple(name for name in ExperimentConfig.model_fields if name not in ("crosscoder", "run_dir"))


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
            raise InputError(f"train: unknown argument {name!r}{_hint(name, value, own)}")
        if value is None and TrainConfig.model_fields[name].is_required():
            continue  # as the signature shows it
        if name in train:
            raise InputError(f"train: {name!r} is given twice: by itself and in `train`")
        train[name] = _plain(value)
    return values | ({"train": train} if train else {})


def _hint(name: str, value: Any, own: tuple[str, ...]) -> str:
    """The keyword that was meant: one of `crosscode.train` itself, or a section with the field in it."""
    known = (*field_paths(ExperimentConfig), *component_fields())
    keywords = {field.removeprefix("train."): field for field in known}
    likely = likely_fields(name, (*keywords, *own))
    if not likely:
        known = f"fields of train ({', '.join(TRAIN_FIELDS)}) and of a config ({', '.join(TOP_FIELDS)})"
        return f"; there are {known}"
    if "." not in likely[0]:
        return f"; did you mean {likely[0]!r}?"
    section, *inner = likely[0].split(".")
    for part in reversed(inner):
        value = {part: value}
    return f"; did you mean {' or '.join(keywords[one] for one in likely)}? As in {section}={short(value)}"


def is_of_config(acts: Any, crosscoder: Any) -> bool:
    """Whether the first argument names a config, of which the second replaces fields.

    Raises:
        InputError: nothing to train on; or activations without a crosscoder.
    """
    if acts is None:
        raise InputError("train: nothing to train on: pass activations and a crosscoder, or the path of a config")
    if isinstance(acts, (str, Path)) and (crosscoder is None or is_config(acts)):
        return True
    if crosscoder is None:
        raise InputError(
            "train: activations without a crosscoder: give the section of a config, such as "
            "{'type': 'sae', 'n_latents': 4096, 'activation': {'type': 'topk', 'k': 32}}"
        )
    return False


def with_crosscoder(values: dict[str, Any], crosscoder: Any) -> dict[str, Any]:
    """The values that replace those of a config, with its section `crosscoder`.

    Raises:
        InputError: not a section.
    """
    if crosscoder is None:
        return values
    if not isinstance(crosscoder, (Mapping, BaseModel)):
        raise InputError(
            f"crosscoder: {type(crosscoder).__name__}: beside a config it must be fields of its section, such as "
            "{'n_latents': 4096}"
        )
    return {**values, "crosscoder": _plain(crosscoder)}


def check_beside_activations(values: Mapping[str, Any]) -> None:
    """Raise `InputError` for what belongs to a run that harvests."""
    for name in _OF_HARVEST:
        if name in values:
            raise InputError(
                f"{name} = {short(values[name])}: is for runs that harvest; of own activations `names` says it"
            )


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
