"""Everything that a run directory says about itself, read once and tolerantly."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crosscode.analysis.metrics_file import Metrics, read_metrics
from crosscode.errors import InputError
from crosscode.runs.directory import RunDirectory
from crosscode.stored import Evaluation, SavedModel, Summary, read_json


@dataclass(frozen=True)
class RunRecord:
    """The files of a run. `summary` and `evaluation` are empty where the run has not written them."""

    path: Path
    config_yaml: str
    metrics: Metrics
    summary: dict[str, Any]
    evaluation: dict[str, Any]
    model_config: dict[str, Any]
    """`final/config.json`: keys `model` and `metadata`"""
    problems: list[str]
    """what a reader of the report should know about missing or damaged files"""

    @property
    def metadata(self) -> dict[str, Any]:
        return self.model_config.get("metadata", {})

    @property
    def is_finished(self) -> bool:
        return bool(self.model_config)

    def figure(self, key: str) -> float | None:
        """A figure by its name in `summary.json`: held out where there is an evaluation, else as last logged."""
        for source in (self.evaluation, self.summary):
            if source.get(key) is not None:
                return source[key]
        held_out = self.metrics.last(f"eval/{key}")
        return self.metrics.last(key) if held_out is None else held_out

    def loss_recovered(self) -> dict[str, dict[str, Any]]:
        """What splicing the reconstruction into the language models costs, by output position; empty if unknown."""
        return self.evaluation.get("loss_recovered") or {}

    def fvu_by_position(self) -> tuple[dict[str, float], bool]:
        """FVU by output position, and whether it is a held-out one."""
        held_out = self.evaluation.get("fvu_by_position") or self.summary.get("fvu_by_position")
        if held_out:
            return {name: math.nan if value is None else value for name, value in held_out.items()}, True
        for prefix, is_held_out in (("eval/fvu/", True), ("fvu/", False)):
            names = [key.removeprefix(prefix) for key in self.metrics.keys() if key.startswith(prefix)]  # noqa: SIM118
            if names:
                return {name: self.metrics.last(prefix + name) or 0.0 for name in names}, is_held_out
        return {}, False


def read_run(path: str | Path) -> RunRecord:
    """Read a run directory; only a missing run is an error.

    Raises:
        InputError: no folder there, or nothing in it that a run writes.
    """
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"run: {str(path)!r} is not a folder")
    config_file = path / "config.yaml"
    problems: list[str] = []
    metrics = read_metrics(path / "metrics.jsonl")
    if not config_file.is_file() and not metrics.rows:
        raise InputError(f"run: {str(path)!r} is not a run directory (no config.yaml and no metrics there)")
    if metrics.n_unreadable:
        problems.append(f"{metrics.n_unreadable} line(s) of metrics.jsonl could not be read and are left out.")
    if not metrics.rows:
        problems.append("The run has logged no metrics, so there are no training curves.")
    files: dict[str, dict[str, Any]] = {}
    for name, kind in (("summary.json", Summary), ("evaluation.json", Evaluation), ("final/config.json", SavedModel)):
        files[name] = {}
        try:
            files[name] = read_json(path / name, kind)
        except FileNotFoundError:
            pass
        except (InputError, OSError) as error:
            problems.append(str(error))
    try:
        RunDirectory(path).check_figures()
    except (InputError, OSError) as error:
        problems.append(str(error))
    n_lost = (files["summary.json"].get("n_metrics") or 0) - len(metrics.rows) - metrics.n_unreadable
    if metrics.rows and n_lost > 0:
        problems.append(f"{n_lost} line(s) of metrics.jsonl are gone.")
    return RunRecord(
        path,
        config_file.read_text(encoding="utf-8", errors="replace") if config_file.is_file() else "",
        metrics,
        files["summary.json"],
        files["evaluation.json"],
        files["final/config.json"],
        problems,
    )
