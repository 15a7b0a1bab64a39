"""What models can do with the formats of other libraries, which they do not know."""

from __future__ import annotations

from functools import cache
from importlib.metadata import entry_points
from typing import Any


@cache
def elsewhere(name: str) -> Any:
    """`load` or `export` of the package that registers them as an entry point of the group `crosscode.models`."""
    (found,) = {point.value: point for point in entry_points(group="crosscode.models", name=name)}.values()
    return found.load()
