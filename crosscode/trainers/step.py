"""Forward and backward of one batch, whole or in parts.

Axes: B tokens · M models · P hookpoints · D width · Xi/Xo input/output crosscoding dims · Di/Do widths · L latents.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from crosscode_kernels.sparse import Latents
from torch import Tensor

from crosscode.evaluation.precision import Precision
from crosscode.models.base import BaseCrosscoder, ForwardResult
from crosscode.models.split import Split
from crosscode.objectives.base import Loss, LossContext, Objective
from crosscode.trainers.compiled import compile_errors_in_one_line
from crosscode.trainers.firing import FiringTracker
from crosscode.trainers.whole_batch import (
    WholeBatch,
    batch_thresholds,
    concat_tokens,
    look_at_whole_batch,
    needs_whole_batch,
    tracks_batches,
)

Observer = Callable[[Tensor, ForwardResult], None]
"""Is shown the target and the forward pass of each part of a batch."""


class TrainingStep:
    """Adds the gradients of a batch to the parameters; the update is that of the whole batch, in how many parts ever.

    Args:
        n_parts: into how many parts a batch is cut, to save memory. Where a part must know of the others
            (`whole_batch`), each is encoded and decoded once more, without gradients.
        compiled: run forward and loss through `torch.compile`.
    """

    def __init__(
        self,
        model: BaseCrosscoder,
        split: Split,
        objective: Objective,
        firing: FiringTracker,
        precision: Precision,
        n_parts: int = 1,
        compiled: bool = False,
    ):
        self.model, self.split, self.objective, self.firing = model, split, objective, firing
        self.precision, self.n_parts = precision, n_parts
        self._forward = torch.compile(self._eager_forward) if compiled else self._eager_forward
        self._compile_errors = compile_errors_in_one_line if compiled else nullcontext
        for part in {model, *model.parts}:  # the choice of a backend cannot be traced
            _ = part.ops

    def __call__(self, acts_BMPD: Tensor, step: int, n_steps: int, observe: Observer | None = None) -> Loss:
        """Forward, loss and backward. The result holds the means over the batch, on the device."""
        pairs = [self.split.activations(part_BMPD) for part_BMPD in acts_BMPD.chunk(self.n_parts)]
        self.model.before_step(step, n_steps)
        with self._compile_errors():
            return self._whole_or_in_parts(pairs, step, n_steps, observe)

    def _whole_or_in_parts(
        self, pairs: Sequence[tuple[Tensor, Tensor]], step: int, n_steps: int, observe: Observer | None
    ) -> Loss:
        if len(pairs) == 1 or not needs_whole_batch(self.model, self.objective):
            return self._run(pairs, step, n_steps, None, observe)
        inputs, targets = [input_ for input_, _ in pairs], [target for _, target in pairs]
        with batch_thresholds(self.model, self.objective, inputs, self._autocast):
            with self._autocast():
                whole = look_at_whole_batch(self.model, inputs, targets)
            self.firing.update_counts(whole.firing_counts_L, sum(input_.shape[0] for input_ in inputs))
            return self._run(pairs, step, n_steps, whole, observe)

    def _run(
        self,
        pairs: Sequence[tuple[Tensor, Tensor]],
        step: int,
        n_steps: int,
        whole: WholeBatch | None,
        observe: Observer | None,
    ) -> Loss:
        n_tokens = sum(input_BXiDi.shape[0] for input_BXiDi, _ in pairs)
        is_whole, keeps_latents = len(pairs) == 1, tracks_batches(self.model)
        kept: list[Latents] = []
        counts_L: Tensor | None = None
        mean: Loss | None = None
        for input_BXiDi, target_BXoDo in pairs:
            with self._autocast():
                error_variance = None if whole is None else whole.error_variance
                forward, values = self._forward(input_BXiDi, target_BXoDo, error_variance, is_whole)
                loss = self.objective.weigh(values, step, n_steps)
            share = input_BXiDi.shape[0] / n_tokens
            (loss.total if is_whole else loss.total * share).backward()
            mean = _add(mean, loss, share)
            if keeps_latents:
                kept.append(forward.latents)
            if not is_whole and whole is None:
                part_counts_L = forward.latents.firing_counts_L()
                counts_L = part_counts_L if counts_L is None else counts_L + part_counts_L
            if observe is not None:
                observe(target_BXoDo, forward)
        if counts_L is not None:
            self.firing.update_counts(counts_L, n_tokens)
        if keeps_latents:
            self.model.after_step(concat_tokens(kept))
        assert mean is not None
        return mean

    def _eager_forward(
        self, input_BXiDi: Tensor, target_BXoDo: Tensor, error_variance: Tensor | None, is_whole: bool
    ) -> tuple[ForwardResult, dict[str, Tensor]]:
        forward = self.model.forward_train(input_BXiDi)
        if is_whole:
            self.firing.update(forward.latents)
        tokens_since_fired_L = self.firing.tokens_since_fired_L
        context = LossContext(self.model, input_BXiDi, target_BXoDo, forward, tokens_since_fired_L, error_variance)
        return forward, self.objective.values(context)

    def _autocast(self):
        return self.precision.autocast(self.model.device)


def _add(mean: Loss | None, loss: Loss, share: float) -> Loss:
    """A running mean over the parts of a batch, detached."""
    if share == 1:
        return Loss(loss.total.detach(), loss.parts, loss.weights)
    total = loss.total.detach() * share
    parts = {name: value * share for name, value in loss.parts.items()}
    if mean is None:
        return Loss(total, parts, loss.weights)
    return Loss(mean.total + total, {name: mean.parts[name] + value for name, value in parts.items()}, loss.weights)
