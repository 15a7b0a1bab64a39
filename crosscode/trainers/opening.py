"""The moment at which a run begins to write: with its first batch in hand, when all that can fail has been tried."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Protocol

from crosscode_kernels import host_buffers
from torch import Tensor

from crosscode.errors import InputError
from crosscode.models.base import BaseCrosscoder
from crosscode.models.folding import check_scaling
from crosscode.objectives.base import Objective
from crosscode.runs.directory import RunDirectory
from crosscode.stopping import check_not_stopped, interruptible
from crosscode.trainers.phases import Phases
from crosscode.trainers.source import ActivationSource


class Beginner(Protocol):
    """A trainer, as far as it matters here."""

    n_steps: int
    phases: Phases
    run: RunDirectory

    def open(self) -> None: ...


def check_parts(model: BaseCrosscoder, objective: Objective, position_names: Sequence[str]) -> None:
    """Raise `InputError` where what a trainer was given does not fit together."""
    objective.check_model(model)
    n_positions = len(model.segments)
    if len(position_names) != n_positions:
        raise InputError(
            f"position_names: {len(position_names)} were given ({', '.join(map(repr, position_names))}), but the "
            f"model's output has {n_positions} position(s)"
        )


def check_ready(model: BaseCrosscoder, scaling_in_Xi: Tensor, scaling_out_Xo: Tensor) -> None:
    """Raise `InputError` for weights that nobody filled, or a scaling that only the last step would find not to fit."""
    model.check_initialised()
    check_scaling(model, scaling_in_Xi, scaling_out_Xo)


def first_batch(
    trainers: Sequence[Beginner], data: ActivationSource, step: int
) -> tuple[Iterator[Tensor], Tensor | None]:
    """The stream, and what `next_batch` takes from it; a signal ends the wait at once (`Stopped`): nothing is lost yet."""
    with interruptible():
        batches = iter(data)
        return batches, next_batch(trainers, batches, step)


def next_batch(trainers: Sequence[Beginner], batches: Iterator[Tensor], step: int) -> Tensor | None:
    """`acts_BMPD` for trainers on one stream, each of which counts the time; None at the end of data or of training.

    Raises:
        InputError: there is not even a first batch.
        Stopped: a signal came; the position of the stream is that before this batch.
    """
    if step >= trainers[0].n_steps:
        return None
    check_not_stopped()
    with ExitStack() as harvest:
        for trainer in trainers:
            harvest.enter_context(trainer.phases("harvest"))
        acts_BMPD = next(batches, None)
    if acts_BMPD is None and step == 0:
        raise InputError(
            "data.source: the text does not give the activations of one batch; give more of it, or lower train.batch_size"
        )
    return acts_BMPD


def open_runs(trainers: Sequence[Beginner], stack: ExitStack) -> None:
    """Hold and open the runs until `stack` ends: all of them, or none, which leaves every run directory as it was. At the end
    goes back what memory ops keep from step to step."""
    stack.callback(host_buffers.clear)
    try:
        for trainer in trainers:
            stack.enter_context(trainer.run.held())
            trainer.open()
    except Exception:
        for trainer in trainers:
            trainer.run.undo()
        raise
