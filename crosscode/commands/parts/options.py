"""Words of the command line -> positional words and nested values, by what the fields of pydantic models let in."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from crosscode.config.checked import checked, field_paths
from crosscode.config.counts import members_of
from crosscode.config.experiment import ExperimentConfig
from crosscode.config.hints import component_fields, likely_fields
from crosscode.config.reading import load_yaml, read_trusted
from crosscode.errors import InputError

_TRUTHS = ("true", "false", "yes", "no", "on", "off", "1", "0")
SEVERAL = (list, tuple, set)


def annotations_at(classes: Sequence[Any], path: Sequence[str]) -> list[Any]:
    """What the field at a path may hold, over all members of unions; `Any` below what is not resolved; [] if there is
    no such field."""
    found = list(classes)
    for name in path:
        found = [inner for annotation in found for inner in _inside(annotation, name)]
    return found


def _inside(annotation: Any, name: str) -> Iterator[Any]:
    for member in members_of(annotation):
        if member is Any or member is dict:
            yield Any
        elif get_origin(member) is dict:
            yield get_args(member)[1]
        elif get_origin(member) in SEVERAL and name.isdecimal():
            yield get_args(member)[0]
        elif is_model(member) and name in fields_of(member):
            yield fields_of(member)[name].annotation
        elif is_model(member) and member.model_config.get("extra") == "allow":
            yield Any


def fields_of(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """Its fields by the names that a user gives."""
    return {info.alias or name: info for name, info in model.model_fields.items()}


def is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


@dataclass
class Words:
    """What stands on the command line."""

    positional: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    """nested values of all options, unchecked"""
    alone: dict[str, str] = field(default_factory=dict)
    """positional words that follow an option which needs no value, and what that option takes"""
    guessed: bool = False
    """a word was taken for the value of an option that is not known; it might be a flag"""


def read_words(arguments: Sequence[str], options: type[BaseModel], config: type[BaseModel] | None = None) -> Words:
    """Sort words into positional ones, options and their values. Names take dashes for underscores.

    A flag needs no value, nor does a section (`--objective.auxk`: with its defaults). `null` unsets what can be unset.
    A list is `a,b`, or `[a, b]`, or the option several times.

    Args:
        options: what belongs to the command itself; its lists are not cut at commas.
        config: a config whose fields are options as well.

    Raises:
        InputError: no such option, or one without its value.
    """
    classes = [options] if config is None else [options, config]
    read, words = Words(), deque(arguments)
    while words:
        word = words.popleft()
        if len(word) < 2 or not word.startswith("-"):
            read.positional.append(word)
            continue
        name, has_text, text = word.removeprefix("--").partition("=")
        path = name.replace("-", "_").split(".")
        annotations = annotations_at(classes, path) if word.startswith("--") else []
        if not annotations:
            near = near_field(".".join(path), classes)
            hint = f"; did you mean --{near}?" if near else ""
            raise InputError(f"unknown option {word.partition('=')[0]}{hint}")
        members = [member for annotation in annotations for member in members_of(annotation)]
        if not has_text and _stands_alone(members, words[0] if words else None):
            value: Any = True if bool in members or Any in members else {}
            takes = "true or false" if bool in members else f"no value, its fields do, as {word}.FIELD VALUE"
            read.alone |= dict.fromkeys(list(words)[:1], f"{word} takes {takes}")
        elif has_text or (words and not words[0].startswith("--")):
            value = _value(
                text if has_text else words.popleft(), members, word, cut=path[0] not in options.model_fields
            )
        else:
            own = fields_of(options).get(".".join(path))
            raise InputError(f"--{name}: expects {(own.title if own else None) or 'a value'}")
        _put(read.values, path, value)
        read.guessed |= Any in members and not has_text and value is not True
    return read


def near_field(path: str, classes: Sequence[type[BaseModel]]) -> str | None:
    """A known field that an unknown one may mean."""
    known = [field for one in classes for field in field_paths(one)]
    if any(issubclass(one, ExperimentConfig) for one in classes):
        known += component_fields()
    return next(iter(likely_fields(path, known)), None)


def _stands_alone(members: list[Any], following: str | None) -> bool:
    """Whether an option has no value, given the word after it."""
    if following is None or following.startswith("--"):
        return bool in members or any(member is Any or _is_section(member) for member in members)
    if bool in members:
        choices = [str(choice) for member in members if get_origin(member) is Literal for choice in get_args(member)]
        return following.lower() not in _TRUTHS and following not in choices and not _is_null(following)
    # One that may be a plain value too (`objective.tanh.weight`: a number or a schedule) takes the word.
    is_section = bool(members) and all(_is_section(member) or member is type(None) for member in members)
    return is_section and not following.startswith("{") and not _is_null(following)


def _is_section(member: Any) -> bool:
    return is_model(member) or member is dict or get_origin(member) is dict


def _is_null(text: str) -> bool:
    return text.lower() in ("null", "none")


def _value(text: str, members: list[Any], option: str, *, cut: bool) -> Any:
    """Numbers and words are left to pydantic."""
    if _is_null(text) and (type(None) in members or Any in members):
        return None
    is_list = any(get_origin(member) in SEVERAL for member in members)
    if text[:1] in ("[", "{") and (is_list or Any in members or any(map(_is_section, members))):
        value = load_yaml(text, option.partition("=")[0])
        return [value] if is_list and isinstance(value, dict) else value
    if is_list:
        return text.split(",") if cut else [text]
    return text


def _put(values: dict[str, Any], path: Sequence[str], value: Any) -> None:
    *parents, last = path
    for name in parents:
        if not isinstance(values.get(name), dict):
            values[name] = {}
        values = values[name]
    old = values.get(last)
    values[last] = [*old, *value] if isinstance(old, list) and isinstance(value, list) else value


def merged(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with nested `overrides`; a mapping whose `type` changes is replaced, not mixed. Of a list, `{"0": ...}` is the
    first."""
    result = dict(values)
    for key, new in overrides.items():
        old = result.get(key)
        if isinstance(old, list) and isinstance(new, dict) and all(place.isdecimal() for place in new):
            result[key] = _merged_list(key, old, new)
        elif isinstance(old, dict) and isinstance(new, dict) and old.get("type") == new.get("type", old.get("type")):
            result[key] = merged(old, new)
        else:
            result[key] = new
    return result


def _merged_list(name: str, old: list[Any], overrides: Mapping[str, Any]) -> list[Any]:
    result = list(old)
    for place, new in overrides.items():
        if int(place) >= len(old):
            raise InputError(f"{name}.{place}: there are {len(old)}, counted from 0")
        one = result[int(place)]
        if isinstance(one, str) and isinstance(new, dict):
            one = {"path": one}  # as `config.registry.NamedByPath` reads it
        result[int(place)] = merged({"": one}, {"": new})[""]
    return result


def experiment_values(
    config: str, overrides: Mapping[str, Any] | None = None, trust_remote_code: bool = False
) -> dict[str, Any]:
    """The values of a config file or recipe with some replaced, checked as far as that goes without torch.

    Raises:
        InputError: no or a bad config file; a field that is unknown or has a bad value, but for those of components.
    """
    values = merged(read_trusted(config, trust_remote_code), overrides or {})
    checked(ExperimentConfig, values)
    return values


def whole_experiment() -> type[ExperimentConfig]:
    """The config of a run with the fields of all components: this takes torch."""
    from crosscode.build.schema import experiment_class

    return experiment_class()
