"""YAML from anyone: each key once, no deeper and no larger than a config can be."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from crosscode.errors import InputError, readable
from crosscode.formats import today
from crosscode.recipes import recipe_path
from crosscode.weight_files import INDEX_FILE, WEIGHTS_FILE

MAX_DEPTH = 50
MAX_VALUES = 100_000
"""values of one text, those that an alias stands for counted each time"""


class _Loader(yaml.SafeLoader):
    """`SafeLoader` that refuses what the standard one passes over or drowns in. What looks like a number or a truth only to
    YAML 1.1 (1:30, on, 010, a date) is the text that stands there; a field of numbers or truths reads it as people do."""

    yaml_implicit_resolvers = {}  # noqa: RUF012
    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _refusal(f"nested more than {MAX_DEPTH} deep", self.peek_event())
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen: dict[str, Any] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                first = seen.setdefault(key.value, key)
                if first is not key:
                    raise _refusal(f"{key.value!r} is given twice (first in line {_line(first)})", key)
        return node

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None and _n_values(node, {}) > MAX_VALUES:
            raise _refusal(f"more than {MAX_VALUES:,} values, aliases counted in full", node)
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes what is something else than text to the reader here, or to other readers."""


_NUMBERS = "-+0123456789."
for _tag, _pattern, _first in (
    ("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", "[-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+", _NUMBERS),
    (
        "float",
        r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        _NUMBERS,
    ),
    ("merge", "<<", "<"),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), list(_first))


def dump_yaml(values: Any) -> str:
    """Text that `load_yaml` reads as the same plain values, in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _refusal(problem: str, at: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=at.start_mark)


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _n_values(node: yaml.Node, known: dict[int, int]) -> int:
    """Values below a node. An alias is the node itself once more; one that holds itself has no end."""
    if id(node) not in known:
        known[id(node)] = MAX_VALUES  # what it counts if it is met within itself
        inner = [item for pair in node.value for item in pair] if isinstance(node, yaml.MappingNode) else node.value
        below = inner if isinstance(node, yaml.CollectionNode) else []
        known[id(node)] = 1 + sum(_n_values(item, known) for item in below)
    return known[id(node)]


def load_yaml(text: str, name: str) -> Any:
    """Plain values. `name`: what the text is, for errors.

    Raises:
        InputError: not valid YAML, a key that is given twice, or nesting, aliases or size out of all bounds.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = " ".join(part for part in (error.context, error.problem) if part)
        raise InputError(f"{name}{line}: {' '.join(problem.split())}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{name}: is not valid YAML: {' '.join(str(error).split())}") from error


def read_trusted(config: str | Path, trust_remote_code: bool, *, is_of_run: bool = False) -> dict[str, Any]:
    """As `read_yaml`. A config that lies in a run, which somebody else may have made, cannot ask for code to be run.

    Args:
        trust_remote_code: that language models may run code of their own was said now, not only in that config.
        is_of_run: it does lie in one; False: it is looked at.

    Raises:
        InputError: it asks for it, and it was not.
    """
    values, path = read_yaml(config), Path(config)
    is_of_run |= path.is_dir() or any(map(_is_ours, path.absolute().parents))
    if is_of_run and not trust_remote_code and recipe_path(str(config)) is None:
        for field, model in _asking(values, ()):
            raise InputError(
                f"{field}.trust_remote_code = True in {str(config)!r}: would run code that comes with "
                f"{model.get('path')!r}; if you trust it, add --trust-remote-code to the command "
                "(in Python trust_remote_code=True)"
            )
    return values


def _is_ours(folder: Path) -> bool:
    """Whether a folder is a run, or looks like one from before there was a marker."""
    beside = ("final", "checkpoints", WEIGHTS_FILE, INDEX_FILE, "manifest.json")
    marked = (folder / ".crosscode").exists()
    return marked or ((folder / "config.yaml").exists() and any((folder / name).exists() for name in beside))


def _asking(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The mappings that ask for trust, each with its place."""
    if isinstance(value, dict) and value.get("trust_remote_code") not in (None, False):
        yield ".".join(path), value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _asking(inner, (*path, str(key)))


def is_config(path: str | Path) -> bool:
    """Whether this names a config: a recipe, a run directory, or a file called like one."""
    path = Path(path)
    return recipe_path(str(path)) is not None or path.suffix in (".yaml", ".yml") or (path / "config.yaml").is_file()


def read_yaml(config: str | Path) -> dict[str, Any]:
    """The values of a config file, of a run directory's, or of a recipe by its name.

    Raises:
        InputError: no such file or recipe, or not a YAML mapping.
    """
    path = recipe_path(str(config)) or Path(config)
    try:
        with readable(f"config: {str(config)!r}"):
            if path.is_dir():
                path = path / "config.yaml"
            if not path.is_file():
                raise InputError(f"config: {str(config)!r} is neither a file nor a recipe; see `crosscode recipes`")
            text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"config: {str(path)!r} is not valid YAML: it is no UTF-8 text") from error
    values = load_yaml(text, f"config: {str(path)!r}")
    if not isinstance(values, dict):
        raise InputError(f"config: {str(path)!r} must hold a mapping of fields, got {type(values).__name__}")
    return today(values, str(path))
