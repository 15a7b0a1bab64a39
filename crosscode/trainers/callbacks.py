"""What a user hangs into training: figures of their own, and whatever is to happen at a step, evaluation or checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crosscode.errors import InputError

if TYPE_CHECKING:
    from crosscode.evaluation.heldout import EvaluationResult

Figures = Mapping[str, Any] | None
"""Figures by name (numbers, or tensors of one), or None for none."""


class Callback:
    """Base of callbacks; override what is needed. What `on_step` and `on_evaluate` return is logged: it stands in
    `metrics.jsonl` (and in every other logger), beside the progress bar, and in the report.

    `trainer` is the `Trainer`: its `model`, `step` (steps done), `tokens`, `run`, `metrics.last`, ... are there to read.
    Reading a value from a GPU makes training wait for it.
    """

    def on_start(self, trainer: Any) -> None:
        """Before the first step of this process: the run directory is there."""

    def on_step(self, trainer: Any) -> Figures:
        """After each step. Figures wait for the next row of metrics (`train.log_every`); a later value replaces them."""

    def on_evaluate(self, trainer: Any, evaluation: EvaluationResult) -> Figures:
        """After each evaluation on held-out activations, in whose row the figures stand."""

    def on_checkpoint(self, trainer: Any, folder: Path) -> None:
        """After a checkpoint was written to `folder`, and after the trained model was (to `final/`)."""


class Callbacks:
    """Several callbacks as one, and the names of all figures that they gave.

    Raises:
        InputError: a figure with the name of one of the trainer's own, or that is no number.
    """

    def __init__(self, callbacks: Sequence[Callback]):
        self.callbacks = list(callbacks)
        self.names: set[str] = set()
        self._waiting: dict[str, float] = {}

    def start(self, trainer: Any) -> None:
        for callback in self.callbacks:
            callback.on_start(trainer)

    def step(self, trainer: Any) -> None:
        for callback in self.callbacks:
            self._take(callback, callback.on_step(trainer))

    def evaluate(self, trainer: Any, evaluation: EvaluationResult) -> None:
        for callback in self.callbacks:
            self._take(callback, callback.on_evaluate(trainer, evaluation))

    def checkpoint(self, trainer: Any, folder: Path) -> None:
        for callback in self.callbacks:
            callback.on_checkpoint(trainer, folder)

    def join(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row of metrics with the figures that wait for one."""
        for name in self._waiting.keys() & row.keys():
            raise InputError(f"callbacks: {name!r} is a figure of the trainer's own; give yours another name")
        waiting, self._waiting = self._waiting, {}
        return {**row, **waiting}

    def _take(self, callback: Callback, figures: Figures) -> None:
        for name, value in (figures or {}).items():
            try:
                self._waiting[name] = float(value)
            except (TypeError, ValueError, RuntimeError) as error:
                raise InputError(
                    f"callbacks: {type(callback).__name__} gave {name!r} = {value!r}: must be a number"
                ) from error
            self.names.add(name)
