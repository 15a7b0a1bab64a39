"""`sweep.json`: what is known of each run of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crosscode.errors import InputError
from crosscode.files import check_is_no_link, write_json
from crosscode.runs.run_files import CONFIG_FILE, read_marker
from crosscode.stored import SweepRow, read_json

SWEEP_FILE = "sweep.json"


class SweepFile:
    """`sweep.json`: for each run its label, folder and id; its config until it is made; once it is over its summary, or
    the error that ended it."""

    def __init__(self, folder: Path, rows: Sequence[dict[str, Any]]):
        self.folder, self.rows = folder, {row["run"]: row for row in rows}

    @classmethod
    def open(cls, folder: Path) -> SweepFile:
        check_is_no_link(folder / SWEEP_FILE)
        try:
            return cls(folder, read_json(folder / SWEEP_FILE, list[SweepRow]))
        except FileNotFoundError as error:
            raise InputError(f"sweep: {str(folder)!r} holds no sweep (no {SWEEP_FILE} there)") from error

    def note(self, label: str, **facts: Any) -> None:
        row = self.rows[label]
        self.rows[label] = {name: row[name] for name in ("run", "path", "id") if name in row} | facts
        self.save()

    def all_made(self) -> None:
        """The runs have their own configs now."""
        if any(row.pop("config", None) is not None for row in self.rows.values()):
            self.save()

    def is_made(self, label: str) -> bool:
        """Whether the run that lies there is that of this sweep, and not one that it was to replace."""
        row, path = self.rows[label], self.path(label)
        if "config" not in row:
            return True
        marker = read_marker(path) if (path / CONFIG_FILE).is_file() else None
        return marker is not None and marker.get("id") == row["id"]

    def save(self) -> None:
        write_json(self.folder / SWEEP_FILE, list(self.rows.values()))

    def path(self, label: str) -> Path:
        """Where a run is now: the whole sweep may have been moved.

        Raises:
            InputError: that is no folder of its own in the sweep's, or a link.
        """
        path = self.folder / Path(self.rows[label]["path"]).name
        if path.name in ("", "..") or path == self.folder:
            raise InputError(f"sweep: {str(self.folder / SWEEP_FILE)!r}: {label}: no folder of a run is named")
        check_is_no_link(path)
        return path

    def unfinished(self) -> list[str]:
        """A run that met a loss that is not finite would meet it again; after other errors it can go on."""
        return [label for label, row in self.rows.items() if "step" not in row and row.get("resumable", True)]

    def state(self) -> str:
        n_failed = sum("error" in row for row in self.rows.values())
        n_done = sum("step" in row for row in self.rows.values())
        return f"{n_done} of {len(self.rows)} runs done" + (f", {n_failed} failed" if n_failed else "")
