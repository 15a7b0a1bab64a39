"""A command: its help, its options as pydantic models, and what it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError

from crosscode.commands.parts.help import describe, option_name, usage
from crosscode.commands.parts.options import Words, fields_of, read_words
from crosscode.config.checked import explain
from crosscode.config.registry import ConfigModel
from crosscode.errors import InputError


class NoOptions(ConfigModel):
    """For a command that takes none."""


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

    def start(self, name: str, arguments: Sequence[str]) -> None:
        """Run it, or print the help that is asked for.

        Raises:
            InputError: an option that there is not, or a bad value of the command's own.
        """
        for i, word in enumerate(arguments):
            if word.partition("=")[0] in ("--help", "-h"):
                topic = word.partition("=")[2] or next(iter(arguments[i + 1 : i + 2]), None)
                print(describe(self, name, topic))
                return
        with _hinting(name):
            words = read_words(arguments, self.options, self.outline)
            if words.guessed and not words.positional and self.whole:
                words = read_words(arguments, self.options, self.whole())
        options = self._own(name, words)

        def fields(config_class: type[BaseModel]) -> dict[str, Any]:
            with _hinting(name):
                typed = read_words(arguments, self.options, config_class).values
            return {field: value for field, value in typed.items() if field not in fields_of(self.options)}

        self.run(options, fields) if self.outline else self.run(options)

    def _own(self, name: str, words: Words) -> Any:
        """The command's own options, checked."""
        known = fields_of(self.options)
        own = {field: value for field, value in words.values.items() if field in known}
        slot = known[self.positional] if self.positional else None
        several = slot is not None and get_origin(slot.annotation) is list
        if words.positional and self.positional:
            own[self.positional] = words.positional if several else words.positional[0]
        if len(words.positional) > (self.positional is not None) and not several:
            raise InputError(f"{name}: {words.positional[-1]!r} is one word too many; {usage(self, name)}")
        if slot is not None and slot.is_required() and self.positional not in own:
            raise InputError(f"{name}: no {slot.title} given; {usage(self, name)}")
        try:
            return self.options.model_validate(own)
        except ValidationError as error:
            shown = explain(error, own, self.options, shown=lambda field: option_name(self, field))
            raise InputError(f"{name}: {shown}") from error


@contextmanager
def _hinting(name: str) -> Iterator[None]:
    """Put the command before what is wrong with its options, and say where to read on."""
    try:
        yield
    except InputError as error:
        hint = "" if str(error).endswith("?") else f"; see `crosscode {name} --help`"
        raise InputError(f"{name}: {error}{hint}") from error
