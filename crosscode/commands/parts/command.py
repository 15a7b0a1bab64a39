"""A command: its help, its options as pydantic models, and what it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pydantic import BaseModel, Field

from crosscode.config.registry import ConfigModel


class NoOptions(ConfigModel):
    """For a command that takes none."""


class TrustOptions(ConfigModel):
    """Of a command that may load language models; help shows them last."""

    trust_remote_code: bool = False
    """let language models run code of their own, where the config says so"""


class RunOptions(TrustOptions):
    """Of a command that reads a run."""

    run_dir: str = Field(title="RUN")
    """run directory, or USER/NAME on the hub"""


@dataclass(frozen=True)
class Command:
    """What the file of a command names `COMMAND`. No such file imports torch: `run` does.

    A command with an `outline` takes the fields of a config as options, too: `run(options, fields)`, where
    `fields(class)` gives the nested values that were typed for them, unchecked, as the class would have them. Others:
    `run(options)`.
    """

    text: str
    """help; its first line stands in the list of commands"""
    run: Callable[..., None]
    options: type[ConfigModel] = NoOptions
    """what belongs to the command itself; `title` of a field: what its value is called"""
    positional: str | None = None
    """the field of `options` that needs no name; several words go into a list"""
    outline: type[BaseModel] | None = None
    """the config, as far as it is known without torch"""
    whole: Callable[[], type[BaseModel]] | None = None
    """the config with the fields of all components, where it has such"""
