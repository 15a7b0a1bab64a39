"""The page that compares the runs of a sweep: FVU against L0, and a table. No script; names of runs enter it as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosscode.analysis.jinja import environment
from crosscode.files import write_text

LEFT, RIGHT, TOP, BOTTOM = 60.0, 700.0, 20.0, 280.0
COLUMNS = ("run", "state", "FVU", "L0", "dead", "loss recovered", "steps")


@dataclass(frozen=True)
class SweepRun:
    """What the page says of one run; None: not known."""

    name: str
    state: str
    """done, unfinished, or the error that ended it"""
    page: str | None = None
    """its own page, relative to the sweep's folder"""
    fvu: float | None = None
    l0: float | None = None
    dead_fraction: float | None = None
    loss_recovered: float | None = None
    """the mean over language models and hookpoints"""
    steps: int | None = None


def write_sweep_page(path: Path, name: str, state: str, runs: Sequence[SweepRun]) -> Path:
    """Write the page, whole or not at all."""
    write_text(path, environment().get_template("sweep.html.j2").render(page_content(name, state, runs)))
    return path


def page_content(name: str, state: str, runs: Sequence[SweepRun]) -> dict[str, Any]:
    """What the template shows."""
    shown = [run for run in runs if run.fvu is not None and run.l0 is not None and run.fvu > 0 and run.l0 > 0]
    x_axis = _Axis([run.l0 for run in shown if run.l0 is not None], LEFT, RIGHT)
    y_axis = _Axis([run.fvu for run in shown if run.fvu is not None], BOTTOM, TOP)
    return {
        "name": name,
        "state": state,
        "columns": COLUMNS,
        "ticks_x": x_axis.ticks(),
        "ticks_y": y_axis.ticks(),
        "points": [
            {
                "x": x_axis.place(run.l0 or 1),
                "y": y_axis.place(run.fvu or 1),
                "name": run.name,
                "href": run.page,
                "hint": f"{run.name}: FVU {run.fvu:.4g}, L0 {run.l0:.4g}",
            }
            for run in shown
        ],
        "rows": [{"name": run.name, "href": run.page, "cells": _cells(run)} for run in runs],
    }


def _cells(run: SweepRun) -> list[str]:
    figures = (run.fvu, run.l0, run.dead_fraction, run.loss_recovered)
    formats = ("{:.4f}", "{:.2f}", "{:.1%}", "{:.3f}")
    shown = ["–" if value is None else form.format(value) for value, form in zip(figures, formats, strict=True)]
    return [run.state, *shown, "–" if run.steps is None else f"{run.steps:,}"]


class _Axis:
    """Logarithmic, a little wider than its values."""

    def __init__(self, values: Sequence[float], start: float, end: float):
        low, high = (min(values), max(values)) if values else (1.0, 1.0)
        self._start, self._length = start, end - start
        self._low, self._high = math.log(low) - 0.15, math.log(high) + 0.3

    def place(self, value: float) -> float:
        return round(self._start + self._length * (math.log(value) - self._low) / (self._high - self._low), 1)

    def ticks(self) -> list[tuple[float, str]]:
        """At round numbers; where there are fewer than two of them, at four places between the ends."""
        powers = range(math.floor(self._low / math.log(10)) - 1, math.ceil(self._high / math.log(10)) + 1)
        values = [digit * 10.0**power for power in powers for digit in (1, 1.5, 2, 3, 5, 7)]
        inside = [value for value in values if self._low <= math.log(value) <= self._high]
        if len(inside) < 2:
            inside = [math.exp(self._low + (self._high - self._low) * i / 5) for i in range(1, 5)]
        return [(self.place(value), f"{value:.3g}") for value in inside]
