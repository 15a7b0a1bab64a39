"""`crosscode recipes`: training schemes that run as they stand."""

from __future__ import annotations

from crosscode.commands.parts.command import Command, NoOptions
from crosscode.recipes import recipe_names, recipe_path


def run(options: NoOptions) -> None:
    for name in recipe_names():
        path = recipe_path(name)
        first_line = path.read_text(encoding="utf-8").splitlines()[0] if path else ""
        print(f"{name:36} {first_line.removeprefix('# ')}")


COMMAND = Command("training schemes that run as they stand: `crosscode train NAME`", run)
