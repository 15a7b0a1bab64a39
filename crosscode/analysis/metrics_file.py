"""Reading what a run has written, however it ended."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosscode.errors import InputError
from crosscode.stored import MetricsRow, parse_json


@dataclass(frozen=True)
class Metrics:
    """The rows of a `metrics.jsonl`, in file order."""

    rows: list[dict[str, Any]]
    n_unreadable: int = 0
    """lines that are no row of metrics, such as the last line of a killed run"""

    def keys(self) -> list[str]:
        """Every key with at least one number, in order of first appearance."""
        seen: dict[str, None] = {}
        for row in self.rows:
            seen.update({key: None for key, value in row.items() if _is_number(value)})
        return list(seen)

    def series(self, key: str, x: str = "step") -> tuple[list[float], list[float]]:
        """Finite values of a key against another, in ascending x. A step that was logged twice (a resumed run repeats
        some) counts with its last value."""
        points = {row[x]: row[key] for row in self.rows if _is_number(row.get(key)) and _is_number(row.get(x))}
        xs = sorted(points)
        return [float(v) for v in xs], [float(points[v]) for v in xs]

    def last(self, key: str) -> float | None:
        """The last finite value of a key."""
        values = self.series(key)[1]
        return values[-1] if values else None


def read_metrics(path: Path) -> Metrics:
    """A metrics file; a missing one has no rows, and lines that cannot be read are counted and left out."""
    if not path.is_file():
        return Metrics([])
    rows, n_unreadable = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.strip():
            continue
        try:
            rows.append(parse_json(line, MetricsRow, str(path)))
        except InputError:
            n_unreadable += 1
    return Metrics(rows, n_unreadable)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
