"""Runs that begin together."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Protocol

from crosscode.runs.directory import RunDirectory


class OpensRun(Protocol):
    """A trainer, as far as it is looked at here."""

    run: RunDirectory

    def open(self) -> None: ...


def open_runs(trainers: Sequence[OpensRun], stack: ExitStack) -> None:
    """Hold and open the runs until `stack` ends: all of them, or none, which leaves every run directory as it was."""
    try:
        for trainer in trainers:
            stack.enter_context(trainer.run.held())
            trainer.open()
    except Exception:
        for trainer in trainers:
            trainer.run.undo()
        raise
