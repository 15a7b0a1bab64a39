"""Pages that are written at each build: every field of a config, every recipe, every public name."""

from __future__ import annotations

import inspect
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import crosscode_kernels
from pydantic.fields import FieldInfo

import crosscode
from crosscode.build.schema import experiment_class
from crosscode.commands.cli import command_names, load_command
from crosscode.commands.parts.help import Section, sections, shown_default, shown_kind, shown_text
from crosscode.config.registry import Configured
from crosscode.recipes import recipe_names, recipe_path

HOMES: dict[str, tuple[str, str]] = vars(crosscode)["_homes"]()
CHAPTERS = {
    "api": "Runs",
    "commands": "Looking and steering",
    "models": "Models",
    "objectives": "Loss terms and schedules",
    "trainers": "Training",
    "runs": "Run directories and loggers",
    "data": "Text, activations, stores",
    "evaluation": "Evaluation",
    "interop": "Other libraries",
    "config": "Configs",
    "errors": "Errors",
    "": "More",
}


def pages() -> dict[str, str]:
    return {"config.md": config_page(), "recipes.md": recipes_page(), "commands.md": commands_page()} | api_pages()


# ---- every field of a config


def config_page() -> str:
    lines = [
        "# Every config field",
        "",
        "*What can I set, and what does it do?* A config is a YAML file; every field is also an",
        "option (`--train.batch_size 8192`).",
        "`crosscode train --help SECTION` says the same in the terminal.",
        "",
        "## The config itself",
        "",
        *_table(Section("", "", "", [experiment_class()])),
    ]
    seen: dict[tuple[object, ...], str] = {}
    for section in sections([experiment_class()]):
        if section.path != section.prefix:
            continue  # one type alone: shown with the others of its kind
        level = "##" if "." not in section.path else "###"
        lines += ["", f"{level} {section.path}", "", _escaped(section.meaning), ""]
        first = seen.setdefault(tuple(section.models), section.path)
        if first != section.path:
            lines.append(f"As [{first}](#{_slug(first)}).")
        else:
            lines += _table(section)
    return "\n".join(lines) + "\n"


def _table(section: Section) -> Iterator[str]:
    shared, types = section.by_type()
    if shared:
        yield from _rows("", section.path, shared)
    for kind, doc, fields in types:
        title = f"**`type: {kind}`** {_escaped(doc)}" if kind else _escaped(doc) if section.path else ""
        yield from _rows(title, section.path, fields)


def _rows(title: str, path: str, fields: dict[str, FieldInfo]) -> Iterator[str]:
    if title:
        yield from (title, "")
    if fields:
        yield from ("| field | meaning |", "|---|---|")
        for name, info in fields.items():
            kind = _escaped(shown_kind(info.annotation))
            inner = f"{path}.{name}".lstrip(".")
            is_section = inner in {section.path for section in sections([experiment_class()])}
            value = f"[{inner}](#{_slug(inner)})" if is_section else f"<code>{kind or 'any'}</code>"
            default = shown_default(info) if not info.is_required() else ""
            says = (
                "; required" if info.is_required() else f"; default <code>{_escaped(default)}</code>" if default else ""
            )
            yield f"| `{name}` | {_escaped(shown_text(info))}<br>{value}{says} |"
        yield ""


def _escaped(text: str) -> str:
    """Text of a cell: angle brackets, stars and bars stand for themselves."""
    parts = re.split(r"(`[^`]*`)", text)
    signs = {"<": "&lt;", "*": "\\*", "|": "&#124;"}
    return "".join(
        f"<code>{_replaced(part[1:-1], signs | {'*': '*'})}</code>" if part.startswith("`") else _replaced(part, signs)
        for part in parts
    )


def _replaced(text: str, signs: dict[str, str]) -> str:
    return "".join(signs.get(letter, letter) for letter in text)


def _slug(title: str) -> str:
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title.lower())).strip("-")


# ---- every recipe, every command


def recipes_page() -> str:
    lines = ["# Recipes", "", "*Which configs run as they stand?* `crosscode train NAME`, or a copy of the file.", ""]
    for name in recipe_names():
        first, _, rest = Path(str(recipe_path(name))).read_text(encoding="utf-8").partition("\n")
        lines += [f"## {name}", "", first.removeprefix("# "), "", "```yaml", rest.strip(), "```", ""]
    return "\n".join(lines)


def commands_page() -> str:
    """What `crosscode COMMAND --help` prints."""
    from crosscode.commands.parts.help import describe

    lines = ["# Every command", "", "*What can I type?*", ""]
    for name in command_names():
        lines += [f"## {name}", "", "```text", describe(load_command(name), name), "```", ""]
    return "\n".join(lines)


# ---- every public name


def public_names() -> dict[str, list[str]]:
    """By chapter of the reference."""
    chapters: dict[str, list[str]] = {title: [] for title in CHAPTERS.values()}
    for name in sorted({*crosscode.__all__, "open"}):
        module = HOMES[name][0]
        room = module.split(".")[1] if module.startswith("crosscode.") else ""
        chapters[CHAPTERS.get(room, CHAPTERS[""])].append(f"crosscode.{name}")
    chapters["Kernels"] = [f"crosscode_kernels.{name}" for name in kernel_names()]
    return {title: names for title, names in chapters.items() if names}


def kernel_names() -> list[str]:
    """Ops and their types, but aliases of types and what `crosscode` has as well."""
    ours = set(crosscode.__all__)
    found = [name for name in crosscode_kernels.__all__ if name not in ours]
    things = {name: getattr(crosscode_kernels, name) for name in found}
    return sorted(name for name, thing in things.items() if inspect.isclass(thing) or inspect.isfunction(thing))


def identifier(name: str) -> str:
    """Where it is defined: what a name refers to."""
    package, _, short = name.partition(".")
    if package == "crosscode":
        return ".".join(HOMES[short])
    found = thing(name)
    return f"{found.__module__}.{found.__qualname__}"


def api_pages() -> dict[str, str]:
    """A page for each chapter, and one that lists all names."""
    index = [
        "# API",
        "",
        "*What can I import?* All of it from `crosscode` itself; the ops from `crosscode_kernels`.",
        "",
    ]
    written = {}
    for title, names in public_names().items():
        page = f"api/{_slug(title)}.md"
        index += [f"## [{title}]({page.removeprefix('api/')})", ""]
        index += [
            f"- [`{name.partition('.')[2]}`][{identifier(name)}]: {_first_sentence(thing(name))}" for name in names
        ]
        index.append("")
        written[page] = "\n".join([f"# {title}", "", *(line for name in names for line in _reference(name))])
    return written | {"api/index.md": "\n".join(index)}


def _reference(name: str) -> list[str]:
    """Members that a class has from one that is public as well stand there."""
    label, found = name.partition(".")[2], thing(name)
    public = {id(getattr(crosscode, each)) for each in HOMES}
    inherited = not any(id(base) in public for base in getattr(found, "__mro__", ())[1:])
    lines = [f"::: {identifier(name)}", "    options:", f"      heading: {name}", f"      toc_label: {label}"]
    lines += [f"      inherited_members: {str(inherited).lower()}", ""]
    if isinstance(found, type) and issubclass(found, Configured):
        lines.insert(-1, "      show_signature: false")  # of a base class; the table says more
    config = getattr(found, "Config", None)
    fields = {} if config is None else {key: info for key, info in config.model_fields.items() if key != "type"}
    return lines + list(_rows("Arguments, which are its fields in a config:", "", fields) if fields else [])


def thing(name: str) -> Any:
    return getattr(crosscode if name.startswith("crosscode.") else crosscode_kernels, name.partition(".")[2])


def _first_sentence(found: Any) -> str:
    return _escaped(
        re.split(r"(?<=[.:;])\s", " ".join((inspect.getdoc(found) or "").split()), maxsplit=1)[0].rstrip(".:;")
    )


def undocumented() -> list[str]:
    """Public names without a docstring."""
    names = [name for names in public_names().values() for name in names]
    return [name for name in names if not (inspect.getdoc(thing(name)) or "").strip()]


def missing_from(site: Path) -> list[str]:
    """Public names that the built site's inventory lacks."""
    packed = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    listed = {line.split(" ")[0] for line in zlib.decompress(packed).decode().splitlines()}
    names = [name for names in public_names().values() for name in names]
    return [name for name in names if identifier(name) not in listed and name not in listed]
