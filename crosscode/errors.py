"""Errors that a user can act on."""

import re
from collections.abc import Collection, Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class CrosscodeError(Exception):
    """Base of all errors raised on purpose by crosscode."""


class Interrupted(CrosscodeError):
    """Training was asked to stop; the run is saved and can be resumed."""

    signal: str | None = None
    """name of what asked"""


class RankLost(CrosscodeError):
    """One of several processes that train together ended, or does not answer."""


def rank_lost(error: Exception) -> RankLost:
    """Said of what a collective raised."""
    return RankLost(
        "another rank has ended or does not answer: training stops here; go on from the last checkpoint with "
        f"crosscode train --resume RUN ({str(error).splitlines()[0][:200]})"
    )


class NotFinite(CrosscodeError):
    """Activations, or figures of them, are NaN or infinite: which, and what would help."""


class InputError(CrosscodeError, ValueError):
    """Bad input: one line that names the field, the value and what would be right.

    The command line prints the message alone and exits with code 2.
    """


@contextmanager
def at_field(field: str, inside: Container[str] = ()) -> Iterator[None]:
    """Put the place in the config before the message of bad input, as one path where that begins with one of the fields
    `inside` it."""
    try:
        yield
    except InputError as error:
        raise type(error)(f"{field}{'.' if _first_name(error) in inside else ': '}{error}") from error


@contextmanager
def in_section(section: str, fields: Container[str]) -> Iterator[None]:
    """Make the name with which the message of bad input begins a path in the config, where it is one of the section's
    fields; constructors know their arguments, but not where a config names them."""
    try:
        yield
    except InputError as error:
        if _first_name(error) not in fields:
            raise
        raise type(error)(f"{section}.{error}") from error


@contextmanager
def readable(what: str) -> Iterator[None]:
    """Raise `InputError` where the system refuses to read `what` the user named."""
    try:
        yield
    except OSError as error:
        place = f"{str(error.filename)!r}: " if error.filename is not None and str(error.filename) not in what else ""
        raise InputError(f"{what}: cannot be read: {place}{error.strerror or first_line(error)}") from error


@contextmanager
def fitting(what: str) -> Iterator[None]:
    """Raise `InputError` where saved state does not fit what it is loaded into. `what` it is, and where it stands."""
    try:
        yield
    except (CrosscodeError, OSError):
        raise
    except Exception as error:  # of any library that takes a part of it
        raise InputError(f"{what} does not fit ({type(error).__name__}: {first_line(error)})") from error


def _first_name(error: InputError) -> str:
    """The first part of the path with which a message begins, as in `k = 0: ...` or `stores.0: ...`."""
    match = re.match(r"(\w+)[\w.]*(?: = |: )", str(error))
    return match[1] if match else ""


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line; its type where it says nothing, and more where the line announces
    it."""
    text = str(error).strip() or type(error).__name__
    first = text.splitlines()[0].strip()
    return " ".join(text.split())[:200] if first.endswith(":") else first


def check_settings(now: Mapping[str, Any], saved: Mapping[str, Any], may_lack: Collection[str] = ()) -> None:
    """Raise `InputError` for the first setting that is another than when a position of the data was saved.

    `may_lack`: settings that earlier versions did not save.
    """
    for name, mine in now.items():
        if saved.get(name) != mine and not (name in may_lack and name not in saved):
            raise InputError(f"data state: {name} was {saved.get(name)!r} when it was saved and is {mine!r} now")


def check_at_least(least: int, **values: int | None) -> None:
    """Raise `InputError` for the first value below `least`; None stands for no value."""
    for name, value in values.items():
        if value is not None and value < least:
            raise InputError(f"{name}: {value} is below {least}")


def problem_text(field: str, problem: Any) -> str:
    """One of pydantic's problems in one line: the field, its value and what would be right."""
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"{field}: required, but not given"
    if problem["type"] == "value_error":
        within = " " if message.startswith("= ") else "." if re.match(r"\w+ = ", message) else ": "
        return f"{field}{within}{message}" if field else message
    if problem["type"] == "union_tag_invalid":
        return f"{field}.type = {problem['ctx']['tag']!r}: must be one of {problem['ctx']['expected_tags']}"
    if problem["type"] == "int_parsing":
        message = "input should be an integer, such as 4096, 1e6 or 64k"
    if problem["type"] in ("model_type", "model_attributes_type"):
        message = "input should be a mapping of fields"
    if problem["type"] == "extra_forbidden":
        return f"{field}: unknown field (value {short(problem['input'])})"
    return f"{field} = {short(problem['input'])}: {message[0].lower()}{message[1:]}"


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
