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
from crosscode.data.text.aligned import OtherTokens
from crosscode.data.text.token_batch import TokenBatch

MAX_LOGITS = 2**26


@dataclass(frozen=True)
class TextPart:
    """Some sequences, where their activations count, and the raw activations (float32)."""

    tokens_HS: Tensor
    mask_HS: Tensor
    segments_HS: Tensor | None
    acts_HSMPD: Tensor
    counted_HS: Tensor
    """of which tokens the predictions count, where they are usable"""
    group_HSG: Tensor | None = None
    """numbers of each token's groups, where they are known"""
    others: tuple[OtherTokens, ...] = ()
    """the same sequences in tokens of other tokenizers"""
    predicted_HS: Tensor | None = None
    """tokens of which predictions count; None: the usable ones"""

    def read_by(self, reads: int) -> TextPart:
        """The part in the tokens of one of the tokenizers (see `ActivationHarvester.reads_M`), without activations there. Usable
        are partners; they predict the tokens behind them, which need have none, and belong to the partners' groups."""
        if not reads:
            return self
        other = self.others[reads - 1]
        mask_HT, acts_HTMP0 = other.moved(self.mask_HS), other.moved(self.acts_HSMPD[..., :0])
        group_HTG = None if self.group_HSG is None else other.moved(self.group_HSG).roll(1, dims=1)
        counted_HT = torch.ones_like(mask_HT)
        shown = (other.tokens_HT, mask_HT, other.segments_HT, acts_HTMP0, counted_HT, group_HTG)
        return TextPart(*shown, predicted_HS=other.usable_HT)

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
        return logits_HSV[:, :-1][self._predicted_HS().to(logits_HSV.device)].log_softmax(-1)

    def predicted(self) -> Tensor:
        """`tokens_N` that `predictions` are about."""
        return self.tokens_HS[:, 1:][self._predicted_HS()]

    def predicted_groups(self) -> Tensor | None:
        """`group_NG` of the tokens that `predictions` are about, where they are known."""
        return None if self.group_HSG is None else self.group_HSG[:, 1:][self._predicted_HS()]

    def by_sequence(self, values_N: Tensor) -> Tensor:
        """`sum_H...` (float64, on the CPU) of values of the predictions."""
        sequence_N = self._predicted_HS().nonzero()[:, 0]
        sums_H = torch.zeros(len(self.mask_HS), *values_N.shape[1:], dtype=torch.float64)
        return sums_H.index_add(0, sequence_N.cpu(), values_N.double().cpu())

    def _predicted_HS(self) -> Tensor:
        of_HS = self.mask_HS if self.predicted_HS is None else self.predicted_HS
        return self.mask_HS[:, :-1] & of_HS[:, 1:] & self.counted_HS[:, 1:]


@torch.no_grad()
def text_parts(
    harvester: ActivationHarvester,
    batches: Iterable[TokenBatch],
    n_tokens: int,
    limit: NormLimit | None = None,
    counted: Iterable[TokenBatch] | None = None,
) -> Iterator[TextPart]:
    """Parts of whole batches, until `n_tokens` usable tokens were seen. Tokens beyond the `limit` count as unusable.

    Args:
        counted: the same text, or those of its sequences that matter, in the same order with other masks: which tokens'
            predictions count, and towards `n_tokens`; default: all.
    """
    rows_counted = None if counted is None else _Rows(counted)
    for batch in batches:
        acts_HSMPD = harvester.harvest(*batch.inputs).float()
        mask_HS = batch.mask_HS if limit is None else limit.narrowed(batch.mask_HS, acts_HSMPD)
        counted_HS = torch.ones_like(mask_HS) if rows_counted is None else rows_counted.masks_of(batch.tokens_HS)
        length = max(one.shape[1] for one in (batch.tokens_HS, *(other.tokens_HT for other in batch.others)))
        rows = max(1, MAX_LOGITS // (length * max(lm.vocab_size for lm in harvester.models)))
        for start in range(0, batch.tokens_HS.shape[0], rows):
            own = slice(start, start + rows)
            segments_HS = None if batch.segments_HS is None else batch.segments_HS[own]
            group_HSG = None if batch.labels is None else batch.labels[own].groups_T2()
            shown = (batch.tokens_HS[own], mask_HS[own], segments_HS, acts_HSMPD[own], counted_HS[own], group_HSG)
            yield TextPart(*shown, tuple(other[own] for other in batch.others))
        n_tokens -= int((mask_HS & counted_HS).sum())
        if n_tokens <= 0:
            return


class _Rows:
    """Sequences with masks, of which others may be left out."""

    def __init__(self, batches: Iterable[TokenBatch]):
        self._rows = (row for batch in batches for row in zip(batch.tokens_HS, batch.mask_HS, strict=True))
        self._next = next(self._rows, None)

    def masks_of(self, tokens_HS: Tensor) -> Tensor:
        """`mask_HS` of the sequences that come next, all False for those that are left out."""
        mask_HS = torch.zeros_like(tokens_HS, dtype=torch.bool)
        for tokens_S, mask_S in zip(tokens_HS, mask_HS, strict=True):
            if self._next is not None and torch.equal(self._next[0], tokens_S):
                mask_S.copy_(self._next[1])
                self._next = next(self._rows, None)
        return mask_HS


def kl_N(p_NV: Tensor, q_NV: Tensor) -> Tensor:
    """`KL(p || q)` of log probabilities, nats."""
    return (p_NV.exp() * (p_NV - q_NV)).sum(-1)
