"""Held-out text with its activations, a few sequences at a time: logits are the largest tensors of an evaluation.

H harvest batch (sequences) · S sequence · V vocabulary · M models · P hookpoints · D width · N predictions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from crosscode.data.harvest.harvester import ActivationHarvester
from crosscode.data.norms import NormLimit
from crosscode.data.text.tokens import TokenBatch

MAX_LOGITS = 2**26


@dataclass(frozen=True)
class TextPart:
    """Some sequences, where their activations count, and the raw activations (float32)."""

    tokens_HS: Tensor
    mask_HS: Tensor
    segments_HS: Tensor | None
    acts_HSMPD: Tensor

    def usable(self) -> Tensor:
        """`acts_BMPD` of the usable positions."""
        return self.acts_HSMPD[self.mask_HS.to(self.acts_HSMPD.device)]

    def everywhere(self, values_B: Tensor) -> Tensor:
        """`values_HS...` of values at the usable positions, 0 elsewhere."""
        values_HS = values_B.new_zeros(*self.mask_HS.shape, *values_B.shape[1:])
        values_HS[self.mask_HS.to(values_B.device)] = values_B
        return values_HS

    def predictions(self, logits_HSV: Tensor) -> Tensor:
        """`log_prob_NV` of what is predicted at a usable position of a usable token."""
        counted_HS = self.mask_HS[:, :-1] & self.mask_HS[:, 1:]
        return logits_HSV[:, :-1][counted_HS.to(logits_HSV.device)].log_softmax(-1)

    def predicted(self) -> Tensor:
        """`tokens_N` that `predictions` are about."""
        return self.tokens_HS[:, 1:][self.mask_HS[:, :-1] & self.mask_HS[:, 1:]]


@torch.no_grad()
def text_parts(
    harvester: ActivationHarvester, batches: Iterable[TokenBatch], n_tokens: int, limit: NormLimit | None = None
) -> Iterator[TextPart]:
    """Parts of whole batches, until `n_tokens` usable tokens were seen. Tokens beyond the `limit` count as unusable."""
    for batch in batches:
        acts_HSMPD = harvester.harvest(batch.tokens_HS, batch.segments_HS).float()
        mask_HS = batch.mask_HS if limit is None else limit.narrowed(batch.mask_HS, acts_HSMPD)
        rows = max(1, MAX_LOGITS // (batch.tokens_HS.shape[1] * max(lm.vocab_size for lm in harvester.models)))
        for start in range(0, batch.tokens_HS.shape[0], rows):
            own = slice(start, start + rows)
            segments_HS = None if batch.segments_HS is None else batch.segments_HS[own]
            yield TextPart(batch.tokens_HS[own], mask_HS[own], segments_HS, acts_HSMPD[own])
        n_tokens -= int(mask_HS.sum())
        if n_tokens <= 0:
            return


def kl_N(p_NV: Tensor, q_NV: Tensor) -> Tensor:
    """`KL(p || q)` of log probabilities, nats."""
    return (p_NV.exp() * (p_NV - q_NV)).sum(-1)
