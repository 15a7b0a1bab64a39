"""The last activations trained on, and the thresholds that follow from them.

Axes: B tokens · Xi input crosscoding dims · Di input width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from crosscode.evaluation.precision import full_precision
from crosscode.models.base import BaseCrosscoder
from crosscode.trainers.prefix_thresholds import calibrate_prefixes_
from crosscode.trainers.whole_batch import thresholds_over

MAX_TOKENS, MAX_BYTES = 100_000, 1 << 28
"""How much is kept; never less than the last batch."""
FIRST_OFFER = 2


class RecentActivations:
    """References to the last batches, for a model with an activation that selects over the batch, or with prefixes that need
    thresholds of their own; nothing for others.

    What a step tracks is a running mean over models that have changed since. A saved model has instead the threshold that
    lets through k latents a token on these activations, which is found by encoding them once more.

    Args:
        n_parts: parts in which a batch is encoded.
    """

    def __init__(self, model: BaseCrosscoder, n_parts: int = 1):
        self.model, self.n_parts = model, n_parts
        self.selects_over_batch = any(fn.selects_over_batch for fn in model.activation_fns)
        self.has_prefixes = any(part.prefix_thresholds_S is not None for part in model.parts)
        self.is_needed = self.selects_over_batch or self.has_prefixes
        self._inputs: deque[Tensor] = deque()
        self._n_tokens = self._n_bytes = 0

    def add(self, input_BXiDi: Tensor) -> None:
        """Take note of a batch: no copy, no work on the device."""
        if not self.is_needed:
            return
        self._inputs.append(input_BXiDi)
        self._n_tokens += input_BXiDi.shape[0]
        self._n_bytes += input_BXiDi.untyped_storage().nbytes()
        while len(self._inputs) > 1 and (
            self._n_tokens - self._inputs[0].shape[0] >= MAX_TOKENS or self._n_bytes > MAX_BYTES
        ):
            oldest = self._inputs.popleft()
            self._n_tokens -= oldest.shape[0]
            self._n_bytes -= oldest.untyped_storage().nbytes()

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Within the block thresholds are those of a saved model; then the running ones again."""
        running = [statistic.clone() for statistic in self._running()]
        self.settle_()
        try:
            yield
        finally:
            self._set_running(running)

    @torch.no_grad()
    def settle_(self) -> None:
        """Set the thresholds of a saved model; without any activations they stay what they are."""
        if not self._inputs:
            return
        inputs = [part for input_BXiDi in self._inputs for part in input_BXiDi.chunk(self.n_parts)]
        if self.selects_over_batch:
            self._settle(inputs)
        if self.has_prefixes:
            with full_precision():
                calibrate_prefixes_(self.model, inputs)

    def _settle(self, inputs: Sequence[Tensor]) -> None:
        was_training, n_offered = self.model.training, FIRST_OFFER
        with ExitStack() as stack:
            stack.enter_context(full_precision())
            for activation in self.model.activation_fns:
                stack.enter_context(activation.annealing_over())
            self.model.train()
            thresholds, enough = thresholds_over(self.model, inputs, 1, n_offered)
            while enough is not None and not bool(enough):
                n_offered *= 2
                thresholds, enough = thresholds_over(self.model, inputs, 1, n_offered)
        self.model.train(was_training)
        for activation, threshold in zip(self.model.activation_fns, thresholds, strict=True):
            activation.settle_threshold_(threshold)

    def state_dict(self) -> dict[str, Any]:
        return {"inputs": list(self._inputs), "running": self._running()}

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """None: a checkpoint of an earlier version, whose model has the running mean."""
        if state is None:
            for activation in self.model.activation_fns:
                for statistic in activation.running_statistics()[1:]:
                    statistic.fill_(float(activation.tracked_threshold() is not None))
            return
        self._set_running(state["running"])
        for input_BXiDi in state["inputs"]:
            self.add(input_BXiDi.to(self.model.device))

    def _running(self) -> list[Tensor]:
        return [statistic for fn in self.model.activation_fns for statistic in fn.running_statistics()]

    @torch.no_grad()
    def _set_running(self, values: list[Tensor]) -> None:
        for statistic, value in zip(self._running(), values, strict=True):
            statistic.copy_(value)
