"""What models can do with the formats of other libraries, which they do not know."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from typing import Any

from crosscode.errors import InputError


@cache
def elsewhere(name: str) -> Any:
    """`load`, `recognise`, `export`, `is_repo` or `fetch`: of the package that registers them as entry points of the group
    `crosscode.models`.

    Raises:
        InputError: the package was not installed again since it declares them.
    """
    found = next(iter(entry_points(group="crosscode.models", name=name)), None)
    if found is None:
        raise InputError("crosscode is installed as an earlier version: install it again (pip install -e .)")
    return found.load()
