"""Errors that a user can act on."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class CrosscodeError(Exception):
    """Base of all errors raised on purpose by crosscode."""


class Interrupted(CrosscodeError):
    """Training was asked to stop; the run is saved and can be resumed."""


class InputError(CrosscodeError, ValueError):
    """Bad input: one line that names the field, the value and what would be right.

    The command line prints the message alone and exits with code 2.
    """


@contextmanager
def at_field(field: str) -> Iterator[None]:
    """Put the place in the config before the message of bad input."""
    try:
        yield
    except InputError as error:
        raise type(error)(f"{field}: {error}") from error


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip()


def check_settings(now: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raise `InputError` for the first setting that is another than when a position of the data was saved."""
    for name, mine in now.items():
        if saved.get(name) != mine:
            raise InputError(f"data state: {name} was {saved.get(name)!r} when it was saved and is {mine!r} now")


def check_at_least(least: int, **values: int | None) -> None:
    """Raise `InputError` for the first value below `least`; None stands for no value."""
    for name, value in values.items():
        if value is not None and value < least:
            raise InputError(f"{name}: {value} is below {least}")
