"""A batch in parts, to save memory; the update is that of the whole batch.

Where a part must know of the others (`whole_batch`), each is encoded and decoded once more, without gradients.

Axes: B tokens · Xi/Xo input/output crosscoding dims · Di/Do widths · L latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

from crosscode_kernels.sparse import Latents
from torch import Tensor

from crosscode.models.base import ForwardResult
from crosscode.models.layered_latents import concat_tokens
from crosscode.objectives.base import NOT_LOOKED_AT, Coefficients, Loss, WholeBatch
from crosscode.trainers.forward import ForwardPass
from crosscode.trainers.whole_batch import (
    OfPart,
    batch_cuts,
    look_at_whole_batch,
    needs_whole_batch,
    tracks_batches,
)

Observer = Callable[[Tensor, ForwardResult], None]
"""Is shown the target and the forward pass of each part, once its gradients are there."""


class BatchInParts:
    """Forward, loss and backward of a batch that is cut into `n_parts`."""

    def __init__(self, forward: ForwardPass, n_parts: int):
        self.forward, self.n_parts = forward, n_parts
        self.model, self.objective, self.firing = forward.model, forward.objective, forward.firing

    def backward(
        self,
        input_BXiDi: Tensor,
        target_BXoDo: Tensor,
        coefficients: Coefficients,
        observers: Sequence[Observer] = (),
    ) -> Loss:
        """Add the gradients of a batch to the parameters. The result holds the means over the batch, detached."""
        inputs, targets = input_BXiDi.chunk(self.n_parts), target_BXoDo.chunk(self.n_parts)
        n_tokens = input_BXiDi.shape[0]
        kept: list[Latents] = []
        if tracks_batches(self.model):
            observers = [*observers, lambda _, forward: kept.append(forward.latents)]
        if needs_whole_batch(self.model, self.objective):
            of_part = batch_cuts(self.model, self.objective, inputs, self.forward.autocast)
            with self.forward.autocast():
                counts_L, whole = look_at_whole_batch(self.model, inputs, targets, of_part)
            self.firing.update_counts(counts_L, n_tokens)
            loss = self._add_up(inputs, targets, coefficients, observers, whole, of_part)
        else:
            counts: list[Tensor] = []
            observers = [*observers, lambda _, forward: counts.append(forward.latents.firing_counts_L())]
            loss = self._add_up(inputs, targets, coefficients, observers)
            self.firing.update_counts(sum(counts[1:], counts[0]), n_tokens)
        if kept:
            self.model.after_step(concat_tokens(kept))
        return loss

    def _add_up(
        self,
        inputs: Sequence[Tensor],
        targets: Sequence[Tensor],
        coefficients: Coefficients,
        observers: Sequence[Observer],
        whole: WholeBatch = NOT_LOOKED_AT,
        of_part: OfPart = lambda i: nullcontext(),
    ) -> Loss:
        n_tokens = sum(input_BXiDi.shape[0] for input_BXiDi in inputs)
        mean: Loss | None = None
        for i, (input_BXiDi, target_BXoDo) in enumerate(zip(inputs, targets, strict=True)):
            share = input_BXiDi.shape[0] / n_tokens
            with of_part(i):
                forward, terms = self.forward.part(input_BXiDi, target_BXoDo, whole)
                loss = self.objective.weigh(terms, coefficients)
                (loss.total * share).backward()
            mean = loss.times(share) if mean is None else mean + loss.times(share)
            for observe in observers:
                observe(target_BXoDo, forward)
        assert mean is not None
        return mean
