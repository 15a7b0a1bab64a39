"""`crosscode report SWEEP`: the page that compares its runs."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.parse import quote

from crosscode.analysis.sweep_page import SweepRun, write_sweep_page
from crosscode.commands.parts.sweep_file import SWEEP_FILE, SweepFile
from crosscode.errors import InputError
from crosscode.runs.directory import RunDirectory
from crosscode.stored import read_json


def is_sweep(folder: str | Path) -> bool:
    return (Path(folder) / SWEEP_FILE).is_file()


def report_sweep(folder: Path) -> Path:
    """Write `report.html` of a sweep, finished or not; returns its path.

    Raises:
        InputError: no whole sweep there, or another process is at work in it.
    """
    with RunDirectory(folder).held():
        file = SweepFile.open(folder)
        runs = [_run(file, label) for label in file.rows]
        return write_sweep_page(folder / "report.html", folder.resolve().name, f"Sweep, {file.state()}", runs)


def _run(file: SweepFile, label: str) -> SweepRun:
    row, path = file.rows[label], file.path(label)
    state = "done" if "step" in row else row.get("error") or "unfinished"
    page = path / "report.html"
    return SweepRun(
        label,
        state,
        page=f"{quote(path.name)}/report.html" if page.is_file() and not page.is_symlink() else None,
        fvu=row.get("fvu"),
        l0=row.get("l0"),
        dead_fraction=row.get("dead_fraction"),
        loss_recovered=None if "step" not in row else _recovered(path),
        steps=row.get("step"),
    )


def _recovered(run: Path) -> float | None:
    """The mean over what was spliced in, where the run was evaluated so."""
    try:
        found = read_json(run / "evaluation.json", dict[str, Any]).get("loss_recovered") or {}
    except (InputError, OSError):
        return None
    values = [one["loss_recovered"] for one in found.values() if one.get("loss_recovered") is not None]
    return fmean(values) if values else None
