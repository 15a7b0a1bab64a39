"""Which field an unknown name may mean."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from functools import cache
from pathlib import Path

_REGISTRY = re.compile(r'^(\w+): Registry\[Any\] = Registry\("([^"]+)"', re.MULTILINE)

REGISTERED: set[tuple[str, str]] = set()
"""Section and type of the components that have registered themselves."""


def likely_fields(path: str, known: Iterable[str]) -> list[str]:
    """Those of the same name, wherever they stand, or one that is spelled like it; in its own section first, or in one that is
    spelled like that. Best first.

    Args:
        path: dotted.
        known: dotted paths of all fields.
    """
    section, _, name = path.rpartition(".")
    names = {field: field.rpartition(".")[2] for field in sorted(known, key=lambda field: (field.count("."), field))}
    beside = {field: name for field, name in names.items() if field.rpartition(".")[0] == section}
    same = [field for field in names if names[field] == name]
    near = get_close_matches(section, [field.rpartition(".")[0] for field in same])
    return (
        sorted(same, key=lambda field: field.rpartition(".")[0] not in near[:1])[:3]
        or _spelled_like(name, beside, 0.6)
        or _spelled_like(name, names, 0.85)
    )


def _spelled_like(name: str, names: dict[str, str], cutoff: float) -> list[str]:
    near = get_close_matches(name, names.values(), n=1, cutoff=cutoff)
    return [next(field for field in names if names[field] == near[0])] if near else []


def component_fields() -> tuple[str, ...]:
    """Dotted paths of the fields of components."""
    return tuple({f"{section}.{name}".rstrip(".") for section, _, fields in _components() for name in ("", *fields)})


def component_types(section: str) -> list[str]:
    """The types of component that a section may name; those of a user's own as far as they are registered by now."""
    return sorted({kind for place, kind in [one[:2] for one in _components()] + [*REGISTERED] if place == section})


@cache
def _components() -> tuple[tuple[str, str, tuple[str, ...]], ...]:
    """Section, type and fields of every component as the sources have them: importing one would import torch."""
    package = Path(__file__).parents[1]
    texts = [
        file.read_text(encoding="utf-8")
        for name in ("models", "objectives", "trainers")
        for file in (package / name).rglob("*.py")
    ]
    sections = dict(found for text in texts for found in _REGISTRY.findall(text))
    classes = [node for text in texts for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef)]
    by_name = {node.name: node for node in classes}
    found = []
    for node in classes:
        registries = [
            one.value for one in node.decorator_list if isinstance(one, ast.Attribute) and one.attr == "register"
        ]
        for registry in (one.id for one in registries if isinstance(one, ast.Name) and one.id in sections):
            for config in _configs(node, by_name):
                fields = dict(_fields(config, by_name))
                kind = fields.pop("type", "")
                found.append((sections[registry].replace("{type}", kind), kind, tuple(fields)))
    return tuple(found)


def _configs(node: ast.ClassDef, by_name: dict[str, ast.ClassDef]) -> Iterator[ast.ClassDef]:
    for inner in node.body:
        if isinstance(inner, ast.ClassDef) and inner.name == "Config":
            yield inner
        if isinstance(inner, ast.Assign) and ast.unparse(inner.targets[0]) == "Configs":
            yield from (by_name[name.id] for name in ast.walk(inner.value) if isinstance(name, ast.Name))


def _fields(config: ast.ClassDef, by_name: dict[str, ast.ClassDef]) -> Iterator[tuple[str, str]]:
    """Names of fields; with `type`, its value."""
    for base in config.bases:
        if isinstance(base, ast.Name) and base.id in by_name:
            yield from _fields(by_name[base.id], by_name)
    for line in config.body:
        if (
            isinstance(line, ast.AnnAssign)
            and isinstance(line.target, ast.Name)
            and "ClassVar" not in ast.unparse(line.annotation)
        ):
            yield line.target.id, str(getattr(line.value, "value", ""))
