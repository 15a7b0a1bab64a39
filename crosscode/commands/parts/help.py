"""Help pages, from what pydantic models say of their fields: an overview, a command, a section of a config, a field."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from crosscode.commands.parts.command import Command, TrustOptions
from crosscode.commands.parts.options import SEVERAL, fields_of, is_model
from crosscode.config.counts import members_of
from crosscode.errors import InputError

_COLUMN = 28
_NARROW = 19
"""The same of commands and sections, which have short names."""
_DEEPEST = 6
_WIDEST = 60


def overview(commands: Mapping[str, Command], description: str, exit_codes: Mapping[int, str]) -> str:
    lines = [_entry(name, command.text.splitlines()[0], _NARROW) for name, command in commands.items()]
    lines += [_entry("--version", "the version of crosscode", _NARROW)]
    codes = [_entry(str(code), meaning, _NARROW) for code, meaning in exit_codes.items()]
    return "\n".join(["usage: crosscode COMMAND ...", "", description, "", *lines, "", "exit codes:", *codes])


def describe(command: Command, name: str, topic: str | None = None) -> str:
    """The page of a command, or of one section, component type or field of its config (`train.optimizer`, `topk`).

    Raises:
        InputError: no such section, type or field.
    """
    if topic is None:
        return "\n".join(_command_page(command, name))
    config = command.whole() if command.whole else command.outline
    roots = [command.options, *([config] if config else [])]
    parts = {section.path: section for section in sections(roots)}
    fields: dict[str, list[str]] = {}
    for section in [Section("", "", "", roots), *parts.values()]:
        if section.path == section.prefix:  # another one says it of all types at once
            fields |= section.pages_of_fields()
    path = topic.lstrip("-").replace("-", "_")
    found = _shortest(path, [*parts, *fields])
    if found is None:
        near = get_close_matches(path, [*parts, *fields], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"{name}: --help {topic}: no such section, type or field{hint}")
    return "\n".join(parts[found].page() if found in parts else fields[found])


def _shortest(name: str, paths: Sequence[str]) -> str | None:
    """A path itself, or the shortest that ends with it."""
    return min((path for path in paths if f".{path}".endswith(f".{name}")), key=len, default=None)


def usage(command: Command, name: str) -> str:
    words = [option_name(command, command.positional)] if command.positional else []
    if words and get_origin(fields_of(command.options)[str(command.positional)].annotation) is list:
        words = [words[0] if " " in words[0] else f"{words[0]} ..."]
    if words and not fields_of(command.options)[str(command.positional)].is_required():
        words = [f"[{words[0]}]"]
    own = [
        _own(command, field) if info.is_required() else f"[{_own(command, field)}]"
        for field, info in _in_order(command).items()
        if field != command.positional
    ]
    more = ["[--section.field VALUE ...]"] if command.outline else []
    return " ".join(["usage: crosscode", name, *words, *own, *more])


def _wrapped_usage(command: Command, name: str) -> str:
    """No line ends within brackets."""
    held = re.sub(r"\[.*?\]", lambda found: found[0].replace(" ", "\0"), usage(command, name))
    return textwrap.fill(held, _width(), subsequent_indent=" " * 7, break_on_hyphens=False).replace("\0", " ")


def option_name(command: Command, field: str) -> str:
    """As a user writes it: the metavariable of what needs no name, `--n-tokens` of what does."""
    field = re.sub(r"(\.\d+)+$", "", field)  # of an item the list
    info = fields_of(command.options).get(field)
    if field == command.positional and info is not None:
        return info.title or field.upper()
    return f"--{field.replace('_', '-')}"


def _in_order(command: Command) -> dict[str, FieldInfo]:
    """What belongs to the command itself, and last what most have."""
    return dict(sorted(fields_of(command.options).items(), key=lambda named: named[0] in TrustOptions.model_fields))


def _own(command: Command, field: str) -> str:
    info = fields_of(command.options)[field]
    kind = "" if field == command.positional or info.annotation is bool else info.title or shown_kind(info.annotation)
    return f"{option_name(command, field)} {kind}".rstrip()


# ---- pages


def _command_page(command: Command, name: str) -> Iterator[str]:
    title, _, text = command.text.partition("\n")
    yield from (_wrapped_usage(command, name), "", *_wrapped(title), *_wrapped(text), "")
    for field, info in _in_order(command).items():
        has_default = info.default is not None and info.default is not False
        yield _entry(_own(command, field), _meaning(info) if has_default else shown_text(info))
    if command.outline is None:
        return
    example = next(sections([command.outline])).path
    says = "Fields of the config, each of them an option; dashes and underscores are alike, 1e6 and 1M are counts."
    more = "shows all of a section, a component or a field, such as"
    yield from ("", *_wrapped(f"{says} `crosscode {name} --help SECTION` {more} `--help {example}`."), "")
    inner = []
    for field, info in command.outline.model_fields.items():
        if field in fields_of(command.options):
            continue
        models = [member for member in _members(info.annotation) if is_model(member)]
        if models or get_origin(info.annotation) is dict:
            names = ", ".join(dict.fromkeys(name for model in models for name in model.model_fields))
            inner.append(_entry(field, f"{shown_text(info)}: {names}" if names else shown_text(info), _NARROW))
        else:
            left, _ = _shown(field, info)
            yield _entry(left, re.split(r"[.;:]\s", shown_text(info))[0] + _default_of(info))
    yield from ("\nSections:", *inner)


@dataclass(frozen=True)
class Section:
    """A part of a config that has fields of its own: one model, or one for each type of a component."""

    path: str
    prefix: str
    """of its fields: without the type, where the path ends with one"""
    meaning: str
    models: Sequence[type[BaseModel]]

    def pages_of_fields(self) -> dict[str, list[str]]:
        """What is said of each field, by its path; of which types, where not all say the same."""
        said: dict[str, dict[tuple[str, str], list[str | None]]] = {}
        for model in self.models:
            for name, info in fields_of(model).items():
                path = f"{self.prefix}.{name}".lstrip(".")
                said.setdefault(path, {}).setdefault(_shown(path, info), []).append(_type_of(model))
        pages: dict[str, list[str]] = {}
        for path, entries in said.items():
            kinds = [kind for types in entries.values() for kind in types if kind]
            if path == f"{self.prefix}.type" and kinds:  # the default comes last
                shown = list(entries)[-1][1]
                meaning = self.meaning if shown.startswith(" (") else shown
                entries = {(f"--{path} {{{','.join(kinds)}}}", meaning): [None] * len(self.models)}
            for entry, types in entries.items():
                of = ", ".join(kind for kind in types if kind) if len(types) < len(self.models) else ""
                pages.setdefault(path, []).extend([*_wrapped(f"type {of}" if of else ""), _entry(*entry)])
        return pages

    def by_type(self) -> tuple[dict[str, FieldInfo], list[tuple[str | None, str, dict[str, FieldInfo]]]]:
        """The fields that all types have, and of each type its name, what it is, and its other fields."""
        own = [fields_of(model) for model in self.models]
        says = [{name: _shown(name, info) for name, info in each.items()} for each in own]
        shared = [name for name in own[0] if len(own) > 1 and all(each.get(name) == says[0][name] for each in says)]
        types = []
        for model, fields in zip(self.models, own, strict=True):
            kind, doc = _type_of(model), _doc_of(model) if len(own) > 1 or self.path != self.prefix else ""
            hidden = {*shared, *(["type"] if kind else [])}
            types.append((kind, doc, {name: info for name, info in fields.items() if name not in hidden}))
        return {name: own[0][name] for name in shared}, types

    def page(self) -> Iterator[str]:
        """What all types have stands first, once."""
        yield from _wrapped(f"{self.path}: {self.meaning}")
        shared, types = self.by_type()
        entries = [_entry(*_shown(f"{self.prefix}.{name}", info)) for name, info in shared.items()]
        yield from (["", "every type", *entries] if entries else [])
        for kind, doc, fields in types:
            yield ""
            title = ": ".join(part for part in (f"type {kind}" if kind else "", doc) if part)
            yield from _wrapped(title)
            yield from (_entry(*_shown(f"{self.prefix}.{name}", info)) for name, info in fields.items())


def sections(classes: Sequence[Any], prefix: str = "", depth: int = 0) -> Iterator[Section]:
    """All that are below; each type of a component is one, too."""
    for model in classes if depth < _DEEPEST else []:
        for name, info in fields_of(model).items():
            inner = [member for member in _members(info.annotation) if is_model(member)]
            if not inner:
                continue
            path = f"{prefix}{name}"
            yield Section(path, path, _meaning(info), inner)
            yield from (
                Section(f"{path}.{_type_of(one)}", path, _meaning(info), [one]) for one in inner if _type_of(one)
            )
            yield from sections(inner, f"{path}.", depth + 1)


def _doc_of(model: type[BaseModel]) -> str:
    """First paragraph of a config's docstring, or of the component's whose `Config` it is."""
    outer = getattr(sys.modules[model.__module__], model.__qualname__.rpartition(".")[0], None)
    doc = vars(model).get("__doc__") or getattr(outer, "__doc__", None) or ""
    return " ".join(doc.split("\n\n")[0].split())


def _members(annotation: Any) -> Iterator[Any]:
    """Members of a union, and those of a list's items."""
    for member in members_of(annotation):
        if get_origin(member) in SEVERAL:
            yield from _members(get_args(member)[0])
        else:
            yield member


def _type_of(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("type")
    choices = get_args(field.annotation) if field is not None else ()
    return choices[0] if len(choices) == 1 else None


# ---- one field


def _shown(path: str, info: FieldInfo) -> tuple[str, str]:
    return f"--{path} {shown_kind(info.annotation)}".rstrip(), _meaning(info)


def shown_kind(annotation: Any) -> str:
    """What a value looks like."""
    kinds = []
    for member in members_of(annotation):
        if get_origin(member) is Literal:
            kinds.append("{" + ",".join(map(str, get_args(member))) + "}")
        elif get_origin(member) in SEVERAL:
            kinds.append(f"[{shown_kind(get_args(member)[0])}, ...]")
        elif is_model(member):
            kinds.append(_type_of(member) or "...")
        elif member is bool:
            kinds.append("[true|false]")
        elif isinstance(member, type) and member is not type(None):
            kinds.append(member.__name__)
    shown = "|".join(dict.fromkeys(kinds))
    return shown if len(shown) < _WIDEST else "..."


def _meaning(info: FieldInfo) -> str:
    return shown_text(info) + _default_of(info)


def shown_text(info: FieldInfo) -> str:
    return " ".join((info.description or "").split())


def _default_of(info: FieldInfo) -> str:
    if info.is_required():
        return " (required)"
    shown = shown_default(info)
    return f" (default: {shown})" if shown else ""


def shown_default(info: FieldInfo) -> str:
    """Nothing where it is empty, or a section with defaults of its own."""
    value = info.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return value.type if hasattr(value, "type") else ""  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _entry(left: str, text: str, column: int = _COLUMN) -> str:
    """Two columns; a long left side stands on a line of its own."""
    lines = textwrap.wrap(text, _width() - column) or [""]
    first = f"  {left}".ljust(column)
    if not first.endswith(" "):
        lines.insert(0, "")
    return "\n".join([first + lines[0], *(" " * column + line for line in lines[1:])]).rstrip()


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _width(), break_on_hyphens=False)


def _width() -> int:
    return max(60, min(120, shutil.get_terminal_size((110, 24)).columns))
