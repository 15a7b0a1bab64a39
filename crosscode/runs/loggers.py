"""Where metrics go: one small protocol, and the file that is always written."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from crosscode.errors import InputError
from crosscode.files import json_text, write_text
from crosscode.runs.histograms import Histogram
from crosscode.stored import Row, parse_json

log = logging.getLogger("crosscode")


@runtime_checkable
class Logger(Protocol):
    """Takes one row of metrics at a time. Made before the run directory is, and writes nothing before `open`."""

    def open(self) -> None:
        """Begin to write: the run directory is there now."""

    def log(self, metrics: dict[str, Any]) -> None:
        """`metrics` holds at least `step`; values are JSON values."""
        ...

    def log_histograms(self, step: int, histograms: dict[str, Histogram]) -> None:
        """Take the histograms of a step, by name."""

    def rewind(self, step: int, n_rows: int) -> None:
        """The run goes on from a step at which it had logged `n_rows`: what came after will come again."""
        ...

    def close(self) -> None:
        """Write what waits; nothing comes after it."""


class JsonlLogger:
    """One JSON object a line of the file `path`, handed to the system at once, so that a killed run keeps what it logged.

    Histograms go into a file of their own beside it. A number that is not finite is written as null.
    """

    def __init__(self, path: Path):
        self._rows, self._histograms = _Lines(path), _Lines(path.with_name("histograms.jsonl"))

    def open(self) -> None:
        """The files are made with their first lines."""

    def log(self, metrics: dict[str, Any]) -> None:
        self._rows.append(json_text(metrics, indent=None))

    def log_histograms(self, step: int, histograms: dict[str, Histogram]) -> None:
        row = {"step": step, **{name: histogram.to_json() for name, histogram in histograms.items()}}
        self._histograms.append(json_text(row, indent=None))

    def rewind(self, step: int, n_rows: int) -> None:
        self._rows.cut(step, n_rows)
        self._histograms.cut(step)

    def close(self) -> None:
        self._rows.close()
        self._histograms.close()


class _Lines:
    """Lines at the end of a file, which is made with the first. What a full disk refuses is kept and tried again."""

    def __init__(self, path: Path):
        self.path = path
        self._file: FileIO | None = None
        self._unwritten = b""

    def append(self, line: str) -> None:
        waited = bool(self._unwritten)
        self._unwritten += line.encode() + b"\n"
        try:
            self._file = self._file or FileIO(self.path, "a")
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not waited:
                log.warning("%s: %s; rows are kept in memory and tried again with the next", self.path, error.strerror)

    def cut(self, last_step: int, n_rows: int | None = None) -> None:
        self.close()
        cut_rows(self.path, last_step, n_rows)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file, self._unwritten = None, b""


def cut_rows(path: Path, last_step: int, n_rows: int | None = None) -> None:
    """Keep the rows up to a step, and at most the first `n_rows`. An unfinished last line goes as well."""
    rows = list(_rows(path)) if path.is_file() else []
    kept = [line for line, step in rows if step is not None and step <= last_step]
    n_dropped = sum(step is None for _, step in rows)
    if n_dropped:
        log.warning("%s: %d lines that cannot be read are dropped", path, n_dropped)
    if n_rows is not None and len(kept) < n_rows:
        log.warning(
            "%s: %d of the %d lines that were written by step %d are gone", path, n_rows - len(kept), n_rows, last_step
        )
    if not path.is_file():
        return
    kept = kept if n_rows is None else kept[:n_rows]
    write_text(path, "".join(f"{line}\n" for line in kept))


def count_lines(path: Path) -> tuple[int, int]:
    """How many lines a file has, and how many of them are no rows."""
    steps = [step for _, step in _rows(path)]
    return len(steps), steps.count(None)


def _rows(path: Path) -> Iterator[tuple[str, int | None]]:
    """Lines with their steps, None where there is none to read."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            yield line, parse_json(line, Row, str(path))["step"]
        except InputError:
            yield line, None
