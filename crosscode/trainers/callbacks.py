"""What a user hangs into training: figures of their own, and whatever is to happen at a step, evaluation or checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from crosscode.errors import InputError
from crosscode.stopping import Stopped

if TYPE_CHECKING:
    from crosscode.evaluation.heldout import EvaluationResult

Figures = Mapping[str, Any] | None
"""Figures by name (numbers, or tensors of one), or None for none."""


class Callback:
    """Base of callbacks; override what is needed. What `on_step` and `on_evaluate` return is logged: it stands in
    `metrics.jsonl` (and in every other logger), beside the progress bar, and in the report.

    `trainer` is the `Trainer`: its `model`, `step` (steps done), `tokens`, `run`, `metrics.last`, ... are there to read.
    Reading a value from a GPU makes training wait for it. Where a callback raises (`KeyboardInterrupt`
    too), the step is finished and the run saved first.
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

    What one of them raises waits in `failure`, so that the trainer can finish the step and save before it raises it: so does
    `InputError` for a figure that is no number, or whose name another callback or the trainer itself has.
    """

    def __init__(self, callbacks: Sequence[Callback]):
        check_each("callbacks", callbacks, Callback)
        self.callbacks = list(callbacks)
        self.names: set[str] = set()
        self.failure: BaseException | None = None
        self._waiting: dict[str, float] = {}
        self._givers: dict[str, Callback] = {}
        self._taken: set[str] = set()

    def start(self, trainer: Any) -> None:
        for callback in self.callbacks:
            callback.on_start(trainer)

    def step(self, trainer: Any) -> None:
        self._tell(lambda callback: self._take(callback, callback.on_step(trainer)))

    def evaluate(self, trainer: Any, evaluation: EvaluationResult) -> None:
        self._tell(lambda callback: self._take(callback, callback.on_evaluate(trainer, evaluation)))

    def checkpoint(self, trainer: Any, folder: Path) -> None:
        self._tell(lambda callback: callback.on_checkpoint(trainer, folder))

    def join(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row of metrics with the figures that wait for one."""
        self._taken |= row.keys()
        waiting, self._waiting = self._waiting, {}
        for name in sorted(self.names & self._taken):
            self._fail(InputError(f"callbacks: {name!r} is a figure of the trainer's own; give yours another name"))
            self.names.discard(name)
            waiting.pop(name, None)
        return {**row, **waiting}

    def raise_failure(self, step: int, folder: Path) -> None:
        """Raise what a callback raised, once the run is saved."""
        failure, self.failure = self.failure, None
        if failure is not None:
            failure.add_note(f"crosscode: a callback raised this; the run is saved after step {step}: {folder}")
            raise failure

    def _tell(self, tell: Callable[[Callback], None]) -> None:
        for callback in self.callbacks:
            try:
                tell(callback)
            except Stopped:
                raise
            except BaseException as error:  # KeyboardInterrupt and SystemExit too: the run is saved first
                self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self.failure = self.failure or error

    def _take(self, callback: Callback, figures: Figures) -> None:
        gave = f"callbacks: {type(callback).__name__} gave"
        if not isinstance(figures, (Mapping, NoneType)):
            raise InputError(f"{gave} {figures!r}: must be figures by name, such as {{'mine': 1.0}}, or None")
        for name, value in (figures or {}).items():
            if not isinstance(name, str) or not name:
                raise InputError(f"{gave} a figure the name {name!r}: must be a text")
            if self._givers.setdefault(name, callback) is not callback:
                raise InputError(f"{gave} {name!r}, as {type(self._givers[name]).__name__} did; name one otherwise")
            try:
                if isinstance(value, str):
                    raise TypeError
                self._waiting[name] = float(value.detach() if isinstance(value, Tensor) else value)
            except (TypeError, ValueError, RuntimeError) as error:
                raise InputError(f"{gave} {name!r} = {value!r}: must be a number") from error
            self.names.add(name)


def check_each(argument: str, given: Any, kind: type) -> None:
    """Raise `InputError` where an argument is no list of objects of a kind."""
    if not isinstance(given, Iterable) or isinstance(given, (str, Mapping)):
        raise InputError(f"{argument} = {given!r}: must be a list of objects of crosscode.{kind.__name__}")
    for one in given:
        if isinstance(one, type) or not isinstance(one, kind):
            raise InputError(f"{argument}: {one!r}: must be an object of crosscode.{kind.__name__}")
