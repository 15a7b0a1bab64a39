"""Plain values -> a config, or one line that names each bad field as it can be set, its value and what would be right."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast, get_args, get_origin

from pydantic import BaseModel, ValidationError

from crosscode.config.hints import component_fields, component_types, likely_fields
from crosscode.errors import InputError, problem_text, short

ConfigT = TypeVar("ConfigT", bound=BaseModel)


def checked(config_class: type[ConfigT], values: Mapping[str, Any], section: str = "") -> ConfigT:
    """A config from plain values, which stand in `section` of a larger one.

    Raises:
        InputError: naming each bad field, its value and what is allowed.
    """
    try:
        return config_class.model_validate(values)
    except ValidationError as error:
        raise InputError(explain(error, values, config_class, section)) from error


def explain(
    error: ValidationError,
    values: Any,
    config_class: type[BaseModel],
    section: str = "",
    shown: Callable[[str], str] = str,
) -> str:
    """One line: each problem with its field (as `shown`), its value and what would be right."""
    problems = []
    for problem in error.errors():
        written = [
            *([section] if section else []),
            *_as_written(problem["loc"], values, missing=problem["type"] == "missing"),
        ]
        path = ".".join(written)
        hint = _near(problem["loc"], path, config_class, section) if problem["type"] == "extra_forbidden" else ""
        unknown = _unknown_type(path.rpartition(".")[0], values) if problem["type"] == "missing" else None
        said = problem_text(shown(path), problem)
        if problem["type"] == "value_error" and path:
            for beside in _fields_at(config_class, list(problem["loc"])):
                said = re.sub(rf"(?<![\w.]){beside}(?= = )", shown(f"{path}.{beside}"), said)
        problems.append(unknown or said + hint)
    return "; ".join(_merged(problems))


def _merged(problems: Iterable[str]) -> Iterable[str]:
    """A value that no member of a union takes is said once, with what each of them would take."""
    by_value: dict[str, list[str]] = {}
    for problem in problems:
        given, colon, would_do = problem.partition(": input should be ")
        by_value.setdefault(given + colon, []).append(would_do)
    for given, would_do in by_value.items():
        yield given + " or ".join(dict.fromkeys(would_do))


def _unknown_type(section: str, values: Any) -> str | None:
    """Where a component's fields are missing, its type may be to blame."""
    for part in section.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    kind, known = values.get("type") if isinstance(values, dict) else None, component_types(section)
    if kind is None or not known or kind in known:
        return None
    return f"{section}.type = {short(kind)}: must be one of {', '.join(known)}"


def signature_with(constructor: Callable[..., Any], config_class: type[BaseModel]) -> inspect.Signature:
    """That of a constructor whose `**fields` are those of a config, for `help` and completion."""
    own = [p for p in inspect.signature(constructor).parameters.values() if p.kind is not p.VAR_KEYWORD]
    return inspect.Signature([*own[1:], *inspect.signature(config_class).parameters.values()])


def _as_written(loc: Sequence[int | str], given: Any, *, missing: bool) -> Iterable[str]:
    """A location without the tags that pydantic adds for unions: only what stands in the config."""
    values: Any = given
    for i, part in enumerate(loc):
        is_key = isinstance(values, dict) and part in values
        is_index = isinstance(values, list) and isinstance(part, int) and part < len(values)
        if is_key or is_index:
            values = cast(Any, values)[part]
            yield str(part)
        elif missing and i == len(loc) - 1:
            yield str(part)


def _near(loc: Sequence[int | str], written: str, config_class: type[BaseModel], section: str) -> str:
    """A hint where an unknown field looks like a known one of the same section or has the name of one elsewhere."""
    beside = _fields_at(config_class, list(loc[:-1]))
    inside = written.rpartition(".")[0]
    is_of_experiment = section or "crosscoder" in config_class.model_fields
    elsewhere = [*field_paths(config_class), *(component_fields() if is_of_experiment else ())]
    if likely := likely_fields(written, [*(f"{inside}.{field}".lstrip(".") for field in beside), *elsewhere]):
        own = [field.rpartition(".")[2] for field in likely if field.rpartition(".")[0] == inside]
        return f"; did you mean {own[0]!r}?" if own else f"; did you mean {' or '.join(likely)}?"
    return f"; known here: {', '.join(beside)}" if beside else ""


def _fields_at(annotation: Any, loc: list[int | str]) -> list[str]:
    """Names of the fields of the model that a location leads to."""
    models = [annotation] if isinstance(annotation, type) else list(_models_in(annotation))
    for model in models:
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            continue
        if not loc:
            return list(model.model_fields)
        head, *rest = loc
        if isinstance(head, str) and head in model.model_fields:
            return _fields_at(model.model_fields[head].annotation, rest)
        type_field = model.model_fields.get("type")
        if type_field is not None and head in get_args(type_field.annotation):
            return _fields_at(model, rest)
    return _fields_at(annotation, loc[1:]) if loc and isinstance(loc[0], int) else []


def field_paths(of: type[BaseModel]) -> list[str]:
    """Every field of a config as a dotted path; a list is one field, whatever is in it."""

    def walk(model: type[BaseModel], prefix: str) -> Iterable[str]:
        for name, field in model.model_fields.items():
            yield prefix + name
            if get_origin(field.annotation) is list:
                continue
            for inner in {*_models_in(field.annotation), field.annotation}:
                if isinstance(inner, type) and issubclass(inner, BaseModel):
                    yield from walk(inner, f"{prefix}{name}.")

    return sorted(set(walk(of, "")))


def _models_in(annotation: Any) -> Iterable[Any]:
    for argument in get_args(annotation):
        yield argument
        yield from _models_in(argument)
