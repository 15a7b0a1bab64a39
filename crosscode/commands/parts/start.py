"""From the words after a command's name to its run: its help, or its options, checked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError

from crosscode.commands.parts.command import Command
from crosscode.commands.parts.help import describe, option_name, usage
from crosscode.commands.parts.options import Words, fields_of, read_words
from crosscode.config.checked import explain
from crosscode.errors import InputError


def start(command: Command, name: str, arguments: Sequence[str]) -> None:
    """Run a command, or print the help that is asked for.

    Raises:
        InputError: an option that there is not, or a bad value of the command's own.
    """
    for i, word in enumerate(arguments):
        if word.partition("=")[0] in ("--help", "-h"):
            topic = word.partition("=")[2] or next(iter(arguments[i + 1 : i + 2]), None)
            print(describe(command, name, topic))
            return
    with _hinting(name):
        words = read_words(arguments, command.options, command.outline)
        if words.guessed and not words.positional and command.whole:
            words = read_words(arguments, command.options, command.whole())
    options = _own(command, name, words)

    def fields(config_class: type[BaseModel]) -> dict[str, Any]:
        with _hinting(name):
            typed = read_words(arguments, command.options, config_class)
        _check_positional(command, name, typed)  # now it is known which options are flags
        return {field: value for field, value in typed.values.items() if field not in fields_of(command.options)}

    command.run(options, fields) if command.outline else command.run(options)


def _own(command: Command, name: str, words: Words) -> Any:
    """The command's own options, checked."""
    known = fields_of(command.options)
    own = {field: value for field, value in words.values.items() if field in known}
    slot = known[command.positional] if command.positional else None
    if words.positional and command.positional:
        own[command.positional] = words.positional if _takes_several(command) else words.positional[0]
    _check_positional(command, name, words)
    if slot is not None and slot.is_required() and command.positional not in own:
        raise InputError(f"{name}: no {slot.title} given; {usage(command, name)}")
    try:
        return command.options.model_validate(own)
    except ValidationError as error:
        shown = explain(error, own, command.options, shown=lambda field: option_name(command, field))
        raise InputError(f"{name}: {shown}") from error


def _takes_several(command: Command) -> bool:
    return (
        command.positional is not None and get_origin(fields_of(command.options)[command.positional].annotation) is list
    )


def _check_positional(command: Command, name: str, words: Words) -> None:
    if len(words.positional) > (command.positional is not None) and not _takes_several(command):
        word = words.positional[-1]
        hint = words.alone.get(word, f"did you mean --{word}?" if "=" in word else usage(command, name))
        raise InputError(f"{name}: {word!r} is one word too many; {hint}")


@contextmanager
def _hinting(name: str) -> Iterator[None]:
    """Put the command before what is wrong with its options, and say where to read on."""
    try:
        yield
    except InputError as error:
        hint = "" if str(error).endswith("?") else f"; see `crosscode {name} --help`"
        raise InputError(f"{name}: {error}{hint}") from error
