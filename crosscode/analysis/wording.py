"""Names and numbers as the report writes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FigureTable:
    """Titles with a hint each, and rows of text."""

    columns: list[tuple[str, str]]
    rows: list[list[str]]


def distinct_labels(names: Sequence[str]) -> dict[str, str]:
    """The part of "<model>/<hookpoint>" that differs; "" for a single name."""
    models = {name.rpartition("/")[0] for name in names}
    hooks = {name.rpartition("/")[2] for name in names}
    if len(names) <= 1:
        return dict.fromkeys(names, "")
    if len(hooks) == 1:
        return {name: name.rpartition("/")[0] for name in names}
    return {name: name.rpartition("/")[2] if len(models) == 1 else name for name in names}


def short_names(name_a: str, name_b: str) -> tuple[str, str]:
    """What tells two positions apart: their models, or of one model their hookpoints."""
    (model_a, _, hook_a), (model_b, _, hook_b) = name_a.rpartition("/"), name_b.rpartition("/")
    if hook_a == hook_b:
        return model_a, model_b
    return (hook_a, hook_b) if model_a == model_b else (name_a, name_b)


def model_name(model: Any) -> str:
    """The name of a language model in a checkpoint's metadata."""
    return str(model.get("name") or model.get("path") or "?") if isinstance(model, dict) else str(model)


def with_article(noun: str) -> str:
    """ "crosscoder" -> "A crosscoder"."""
    return f"An {noun}" if noun[0] in "aeiouS" else f"A {noun}"


def latent_name(latent: int, layers: Sequence[tuple[str, int]] | None) -> str:
    """Its number; of a compound model, whose latents `layers` names, with (layer, index)."""
    return str(latent) if layers is None else "{} ({}, {})".format(latent, *layers[latent])


def join_and(words: Sequence[str]) -> str:
    """ "a, b and c"."""
    return " and ".join(words) if len(words) < 3 else ", ".join(words[:-1]) + f" and {words[-1]}"


def number_text(value: float | None) -> str:
    """Three digits, trailing zeros kept so that columns line up; "n/a" for None."""
    if value is None:
        return "n/a"
    text = f"{value:#.3g}".rstrip(".")
    return text if "e" not in text else f"{value:,.0f}" if abs(value) >= 1000 else text


def percent_text(share: float | None) -> str:
    """A share of 1 in percent; "n/a" for None."""
    if share is None:
        return "n/a"
    return f"{100 * share:.2g} %" if 0 < share < 0.1 else f"{100 * share:.1f} %"


def duration_text(seconds: float) -> str:
    """In the unit that a reader thinks in."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
