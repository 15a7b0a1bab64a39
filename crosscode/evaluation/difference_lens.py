"""Activation difference lens: the mean difference of two models' activations, and the tokens that it stands for. No training.

Minder et al. 2025, "Narrow Finetuning Leaves Clearly Readable Traces in Activation Differences": over text that has nothing to do
with the fine-tuning, the mean of `x_B - x_A` at each of the first positions, read through the logit lens. The paper's patchscope
and steering are not here: what `Run.steer` does with a latent is done with a hook and `mean_D`.

H sequences · S sequence · M models · P hookpoints · D width · V vocabulary · K first positions, then all of the text.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from crosscode.data.harvest.harvester import ActivationHarvester, positions_within_segments
from crosscode.data.norms import NormLimit
from crosscode.data.text.token_batch import TokenBatch
from crosscode.errors import InputError
from crosscode.evaluation.precision import full_precision
from crosscode.evaluation.text_parts import text_parts
from crosscode.groups import ByGroup, Groupings
from crosscode.widths import Widths


@dataclass(frozen=True)
class MeanDifference:
    """The mean of `x_B - x_A` at one hookpoint."""

    hookpoint: str
    """by its name"""
    position: int | None
    """how far into a text, from 0; None: over all usable tokens"""
    n_tokens: int
    """over which the mean is taken"""
    mean_D: Tensor
    """float32, on the CPU, in the space of raw activations"""
    norm_of_a: float
    """mean norm of A's activations"""
    norm_of_difference: float
    """mean norm of the differences; that of `mean_D` is as large where all tokens differ in one and the same way"""
    groups: dict[str, dict[str, MeanDifference]] = field(default_factory=dict)
    """of that over all usable tokens: those of each group alone, by kind and group, where there are several"""

    @property
    def norm(self) -> float:
        """Of the mean."""
        return float(self.mean_D.norm())


def check_widths(widths_MP: Widths, model_a: int, model_b: int) -> None:
    """Raise `InputError` for two models that have no difference."""
    widths_MP.check_alike("language_models: vectors of different width have no difference", (model_a, model_b))


@full_precision()
@torch.no_grad()
def mean_differences(
    harvester: ActivationHarvester,
    batches: Iterable[TokenBatch],
    *,
    model_a: int = 0,
    model_b: int = 1,
    n_tokens: int = 8192,
    n_first: int = 5,
    limit: NormLimit | None = None,
    groupings: Groupings | None = None,
) -> list[MeanDifference]:
    """By hookpoint, at each of the first positions of a text, and over all usable tokens. Sums are float64.

    Args:
        harvester: of the language models and hookpoints.
        batches: tokens, such as a `TokenSequenceLoader` gives.
        model_a: number of one of the harvester's models.
        model_b: number of the other.
        n_tokens: usable tokens after which no further batch is taken.
        n_first: positions that are looked at one by one: of each sequence, or of each of its documents where these are isolated.
            Training leaves the very first one out; here it counts. Positions are the first model's; one without a partner in
            each other tokenizer, as BOS, has no difference.
        limit: tokens beyond it count as unusable.
        groupings: ways to group tokens, for means over each group, too.

    Raises:
        InputError: no such model, twice the same, or no usable token.
    """
    M, P, D = harvester.dims
    if model_a == model_b or not {model_a, model_b} <= set(range(M)):
        raise InputError(f"models = {model_a}, {model_b}: must be two of the {M} language models, counted from 0")
    check_widths(harvester.widths_MP, model_a, model_b)
    sums_K = [_Sums(P, D, None if k < n_first else groupings) for k in range(n_first + 1)]
    for part in text_parts(harvester, batches, n_tokens, limit):
        masks = _masks(part.mask_HS, part.segments_HS, n_first)
        for sums, mask_HS in zip(sums_K, masks, strict=True):
            for other in part.others:
                mask_HS = mask_HS & (other.place_HS >= 0)
            acts_BMPD = part.acts_HSMPD[mask_HS.to(part.acts_HSMPD.device)].double()
            group_BG = None if part.group_HSG is None else part.group_HSG[mask_HS]
            sums.add(acts_BMPD[:, model_a], acts_BMPD[:, model_b], group_BG)
    if not sums_K[-1].n:
        raise InputError("data.source: the text has no usable token")
    return [
        sums.result(p, hookpoint, k if k < n_first else None)
        for p, hookpoint in enumerate(harvester.hookpoints)
        for k, sums in enumerate(sums_K)
        if sums.n
    ]


class _Sums:
    """Over tokens, in all and for each group."""

    def __init__(self, P: int, D: int, groupings: Groupings | None = None):
        self.n, self._sum_PD = 0, torch.zeros(P, D, dtype=torch.float64)
        self._norm_P2 = torch.zeros(P, 2, dtype=torch.float64)
        self._groups = ByGroup(groupings, partial(_Sums, P, D))

    def add(self, a_BPD: Tensor, b_BPD: Tensor, group_BG: Tensor | None = None) -> None:
        difference_BPD = b_BPD - a_BPD
        self.n += len(a_BPD)
        self._sum_PD += difference_BPD.sum(0).cpu()
        self._norm_P2 += torch.stack([a_BPD.norm(dim=-1), difference_BPD.norm(dim=-1)], -1).sum(0).cpu()
        for sums, of_group_B in self._groups.of(group_BG):
            own_B = of_group_B.to(a_BPD.device)
            sums.add(a_BPD[own_B], b_BPD[own_B])

    def result(self, p: int, hookpoint: str, position: int | None = None) -> MeanDifference:
        norm_a, norm_difference = (self._norm_P2[p] / self.n).tolist()
        mean_D, groups = (self._sum_PD[p] / self.n).float(), self._groups.result(lambda one: one.result(p, hookpoint))
        return MeanDifference(hookpoint, position, self.n, mean_D, norm_a, norm_difference, groups)


def _masks(mask_HS: Tensor, segments_HS: Tensor | None, n_first: int) -> list[Tensor]:
    """Where each of the first positions is, padding left out, and then all usable positions."""
    segments_HS = torch.zeros_like(mask_HS, dtype=torch.int64) if segments_HS is None else segments_HS
    place_HS = positions_within_segments(segments_HS.to(mask_HS.device))
    not_behind_HS = mask_HS.flip(1).cummax(1).values.flip(1)
    return [(place_HS == k) & not_behind_HS for k in range(n_first)] + [mask_HS]
