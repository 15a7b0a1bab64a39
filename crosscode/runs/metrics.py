"""What a trainer reports: rows of metrics and histograms to every logger, and the latest value of each figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from crosscode.runs.histograms import Histogram
from crosscode.runs.loggers import Logger


class Metrics:
    """`last` holds the latest value of everything that was ever logged, `n_rows` how many rows there were."""

    def __init__(self, loggers: Sequence[Logger]):
        self.loggers = loggers
        self.n_rows = 0
        self.last: dict[str, Any] = {}

    def open(self) -> None:
        """The run directory is there and ours: what logs into it may begin."""
        for logger in self.loggers:
            logger.open()

    def log(self, row: dict[str, Any]) -> None:
        self.last = {**self.last, **row}
        self.n_rows += 1
        for logger in self.loggers:
            logger.log(row)

    def log_histograms(self, step: int, histograms: dict[str, Histogram]) -> None:
        for logger in self.loggers:
            logger.log_histograms(step, histograms)

    def rewind(self, step: int) -> None:
        """Forget, in files as well, what was logged after the state that was loaded."""
        for logger in self.loggers:
            logger.rewind(step, self.n_rows)

    def close(self) -> None:
        for logger in self.loggers:
            logger.close()

    def state_dict(self) -> dict[str, Any]:
        return {"n_rows": self.n_rows, "last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.n_rows, self.last = state["n_rows"], state["last"]
