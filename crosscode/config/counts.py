"""Counts as people write them, and what a field's annotation lets in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

_COUNT = re.compile(r"(\d[\d_]*(?:\.\d+)?(?:[eE]\+?\d{1,2})?)([kKMBT]?)")
_UNITS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def as_count(text: str) -> int | str:
    """`1e6`, `100_000`, `1M`, `2.5k`, `1B` -> int; what is no whole number stays as it is."""
    match = _COUNT.fullmatch(text.strip())
    if match is None:
        return text
    value = Decimal(match[1].replace("_", "")) * _UNITS[match[2]]
    return int(value) if value == value.to_integral_value() else text


def members_of(annotation: Any) -> Iterator[Any]:
    """The types that an annotation lets in, without `Annotated` and unions."""
    if get_origin(annotation) is Annotated:
        yield from members_of(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for member in get_args(annotation):
            yield from members_of(member)
    else:
        yield annotation
