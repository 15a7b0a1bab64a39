"""`crosscode pull`: a model from the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from crosscode.commands.parts.command import Command
from crosscode.commands.parts.libraries import quiet_libraries
from crosscode.config.registry import ConfigModel

TEXT = """download a model from the Hugging Face hub into a new folder
What `crosscode push` uploaded. load, export and finetune_from take USER/NAME as well, without this."""


class Options(ConfigModel):
    name: str = Field(title="USER/NAME")
    """the repository"""
    out: Path | None = Field(default=None, title="DIR")
    """a new folder; null: NAME"""
    revision: str | None = None
    """branch, tag or commit"""


def run(options: Options) -> None:
    quiet_libraries()
    from crosscode.interop.hub import pull

    print(pull(options.name, options.out or Path(options.name.split("/")[-1]), options.revision))


COMMAND = Command(TEXT, run, Options, positional="name")
