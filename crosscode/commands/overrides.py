"""`crosscode train CONFIG.yaml [--section.field value ...]`: a config file with fields replaced on the command line."""

from __future__ import annotations

from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, cast

from pydantic import BaseModel, ValidationError, create_model
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from crosscode.build.schema import check_config, experiment_class, read_yaml
from crosscode.config.checked import field_paths
from crosscode.config.experiment import ExperimentConfig
from crosscode.errors import InputError

HELP_HEAD = """Train from CONFIG.yaml (a file, a run directory, or a recipe's name: `crosscode recipes`).
`crosscode train --resume RUN` goes on with a run that was stopped, as if it never had been; --overwrite replaces it.
Ctrl-C or SIGTERM finishes the step, saves, and exits with code 75; a second one exits at once.
Every field of the config can be replaced on the command line: --train.batch_size 512 --crosscoder.activation.k 16"""


@dataclass(frozen=True)
class Command:
    """A command whose options are the fields of a config."""

    name: str
    help: str
    config_class: Callable[[], type[BaseModel]]
    needs_file: bool = True
    positional: str = "CONFIG.yaml"
    """what stands before the options"""

    @property
    def usage(self) -> str:
        return f"crosscode {self.name} {self.positional}"


class _HelpFormatter(RawDescriptionHelpFormatter):
    """Help whose first line names the form of an option instead of listing every field, as the sections below do."""

    def add_usage(self, usage: str | None, *args: Any, **kwargs: Any) -> None:
        super().add_usage(usage or "%(prog)s [--section.field VALUE ...]", *args, **kwargs)


TRAIN = Command("train", HELP_HEAD, experiment_class)


def with_bare_flag(arguments: list[str]) -> tuple[list[str], bool]:
    """Arguments with a value after a bare `--overwrite`, and whether that option was typed at all."""
    completed: list[str] = []
    for argument, following in zip(arguments, [*arguments[1:], "--"], strict=True):
        completed.append(argument)
        if argument == "--overwrite" and following.startswith("-"):
            completed.append("true")
    return completed, any(argument.split("=")[0] == "--overwrite" for argument in arguments)


def values_from_arguments(arguments: list[str], command: Command) -> dict[str, Any]:
    """The values in a config file and on the command line, unchecked. `--help` prints every field and exits.

    Raises:
        InputError: no or a bad config file, an unknown option, a bad value.
    """
    asks_help = "--help" in arguments or "-h" in arguments
    positional = arguments[0] if arguments and not arguments[0].startswith("-") else None
    if positional is None and not asks_help and command.needs_file:
        raise InputError(f"{command.name}: no config given; usage: {command.usage} [--section.field value ...]")
    values = {} if asks_help or positional is None else read_yaml(positional)
    overrides = option_values(arguments[1:] if positional is not None else arguments, command)
    return _merged(values, overrides)


def config_from_arguments(arguments: list[str]) -> ExperimentConfig:
    """The checked config of `crosscode train ARGUMENTS`.

    Raises:
        InputError: no or a bad config file, an unknown option, a bad value.
    """
    return check_config(values_from_arguments(arguments, TRAIN))


def option_values(arguments: list[str], command: Command) -> dict[str, Any]:
    """Nested values of the options that were given, unchecked; exits after printing the help.

    Raises:
        InputError: an unknown option.
    """
    settings = _settings_class(command)
    try:
        source: CliSettingsSource[Any] = CliSettingsSource(
            settings,
            cli_parse_args=arguments,
            cli_prog_name=command.usage,
            cli_exit_on_error=False,
            formatter_class=_HelpFormatter,
        )
        return source()
    except (SettingsError, ValidationError) as error:
        text = " ".join(str(error).split()).removeprefix("error parsing CLI: ")
        raise InputError(
            f"{command.name}: {text}{_near(text, command)}; `crosscode {command.name} --help` lists every field"
        ) from error


def _near(message: str, command: Command) -> str:
    """A hint where an unknown option looks like a known one."""
    unknown = [word.removeprefix("--").split("=")[0] for word in message.split() if word.startswith("--")]
    near = get_close_matches(unknown[0], field_paths(command.config_class()), n=1) if unknown else []
    return f"; did you mean --{near[0]}?" if near else ""


def _settings_class(command: Command) -> type[BaseSettings]:
    class Settings(BaseSettings):
        model_config = SettingsConfigDict(cli_hide_none_type=True, cli_avoid_json=True, extra="forbid")

        @classmethod
        def settings_customise_sources(cls, *args: Any, **kwargs: Any) -> tuple[PydanticBaseSettingsSource, ...]:
            return ()

    fields: dict[str, Any] = {
        name: (field.annotation, field) for name, field in command.config_class().model_fields.items()
    }
    made = create_model(command.name.capitalize(), __base__=Settings, **fields)
    made.__doc__ = command.help
    return cast(type[BaseSettings], made)


def _merged(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """`values` with nested `overrides`; a mapping whose `type` changes is replaced, not mixed."""
    merged = dict(values)
    for key, new in overrides.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(new, dict) and old.get("type") == new.get("type", old.get("type")):
            merged[key] = _merged(old, new)
        else:
            merged[key] = new
    return merged
