"""How much of the difference between two models' predictions goes away when latents of one are added to the other
(Minder et al. 2025, arXiv 2504.02922): the causal claim behind a ranking.

At each usable token, `sum_l a_l (W_dec[l, B] - W_dec[l, A])` is added to model A's activation at each hookpoint, with `a_l`
as the crosscoder finds it on both models' own activations: A gets what B has of these latents. What counts is

    share closed = 1 - KL(B || A with them) / KL(B || A)

on held-out text, beside the same with random latents: at each token the same activations, and vectors of the same norms, but
in the directions in which other latents, drawn among those that fire, write to B.

H sequences · S sequence · B usable tokens · P hookpoints · D width · N latents · V vocabulary · Q all sequences.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean

import torch
from torch import Tensor

from crosscode.data.harvest.harvester import ActivationHarvester
from crosscode.data.norms import NormLimit
from crosscode.data.text.token_batch import TokenBatch
from crosscode.errors import InputError
from crosscode.evaluation.bootstrap import interval_95, resampled_means
from crosscode.evaluation.precision import full_precision
from crosscode.evaluation.splicing import Splicer
from crosscode.evaluation.text_parts import TextPart, kl_N, text_parts
from crosscode.groups import ByGroup, Groupings
from crosscode.models.base import BaseCrosscoder
from crosscode.models.decoder_vectors import decoder_vectors_NXD
from crosscode.models.split import Split
from crosscode.widths import Widths


@dataclass(frozen=True)
class Closes:
    """KL divergences are means over predicted tokens, nats."""

    latents: list[int]
    n_tokens: int
    kl: float
    """KL(B || A)"""
    kl_closed: float
    """KL(B || A with the latents)"""
    share: float | None
    """1 - kl_closed / kl; negative where the latents make it worse; None for a group of which both predict the same"""
    share_ci95: list[float] | None
    """its 95 % interval by the bootstrap over sequences; None for a single one"""
    random_shares: list[float]
    """the same for each draw of random latents"""
    random_share: float | None
    """their mean"""
    answers: Closes | None = None
    """the same, where only predictions of what the assistant says count; None where there are no chats"""
    groups: dict[str, dict[str, Closes]] = field(default_factory=dict)
    """of the predictions of each group's tokens, by kind and group, where there are several"""


def check_common(split: Split, reads_M: Sequence[int], widths_MP: Widths, model_a: int, model_b: int) -> None:
    """Raise `InputError` for models of which nothing can be closed: what is studied writes to both of them, KL compares
    predictions of the same tokens, and what one writes is added to the other's vectors.

    Args:
        reads_M: which tokenizer each model reads.
    """
    written = [m for m, _ in split.output_places(len(widths_MP), len(widths_MP[0]))]
    n_a = 0 if split.difference else written.count(model_b)
    if model_a == model_b or model_b not in written or written.count(model_a) != n_a:
        raise InputError("closes: needs a crosscoder that writes to two language models")
    if reads_M[model_a] != reads_M[model_b]:
        raise InputError("closes: models of different tokenizers predict no common tokens")
    problem = "closes: vectors of one model cannot be added to another of a different width"
    widths_MP.check_alike(problem, (model_a, model_b))


@full_precision()
@torch.no_grad()
def measure_closes(
    model: BaseCrosscoder,
    harvester: ActivationHarvester,
    batches: Iterable[TokenBatch],
    split: Split,
    latents: Sequence[int],
    alive_L: Tensor,
    *,
    model_a: int = 0,
    model_b: int = 1,
    n_tokens: int = 4096,
    n_random: int = 5,
    seed: int = 0,
    limit: NormLimit | None = None,
    counted: Iterable[TokenBatch] | None = None,
    groupings: Groupings | None = None,
) -> Closes:
    """What the latents of model B close when they are added to model A.

    Args:
        model: folded, with outputs at both language models, or at their difference.
        latents: those of B.
        alive_L: bool; among which random latents are drawn.
        n_tokens: usable tokens after which no further batch is taken.
        n_random: draws of as many random latents.
        limit: tokens beyond it count as unusable.
        counted: the same text with masks of the tokens whose predictions count; default: all.
        groupings: ways to group predicted tokens, of which the figures are given apart, too.

    Raises:
        InputError: no latents, too few others, or outputs that do not cover both models.
    """
    check_common(split, harvester.reads_M, harvester.widths_MP, model_a, model_b)
    places = split.output_places(*harvester.dims[:2])
    x_AP, x_BP = ([x for x, (m, _) in enumerate(places) if m == wanted] for wanted in (model_a, model_b))
    hookpoints = [p for m, p in places if m == model_b]
    latents_N = torch.tensor(list(latents), dtype=torch.long, device=model.device)
    if not len(latents_N):
        raise InputError("closes: no latents to add")
    vectors_NXD = decoder_vectors_NXD(model, latents_N).float()
    difference_NPD = vectors_NXD if split.difference else vectors_NXD[:, x_BP] - vectors_NXD[:, x_AP]
    others = alive_L.clone().cpu()
    others[latents_N.cpu()] = False
    others_O = others.nonzero().squeeze(1)
    if n_random and len(others_O) < len(latents_N):
        raise InputError(f"closes: {len(latents_N)} latents, but only {len(others_O)} others fire to compare them with")
    generator = torch.Generator().manual_seed(seed)
    added = [difference_NPD]
    for _ in range(n_random):
        drawn_N = others_O[torch.randperm(len(others_O), generator=generator)[: len(latents_N)]]
        random_NPD = decoder_vectors_NXD(model, drawn_N)[:, x_BP].float()
        norm_NP1 = random_NPD.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        added.append(random_NPD / norm_NP1 * difference_NPD.norm(dim=-1, keepdim=True))
    splicer_a, splicer_b = (Splicer(harvester, m) for m in (model_a, model_b))
    sums = _Sums(latents_N.tolist(), groupings)
    for part in text_parts(harvester, batches, n_tokens, limit, counted):
        input_BXiDi = split.activations(part.usable().to(model.device))[0]
        a_BN = model.encode_latents(input_BXiDi).columns_BN(latents_N).float()
        b_HSV, a_HSV = (one.logits(part.tokens_HS, part.segments_HS) for one in (splicer_b, splicer_a))
        n_vocabulary = min(b_HSV.shape[-1], a_HSV.shape[-1])  # one of them may have rows for tokens that there are not
        b_NV, plain_NV = (part.predictions(logits_HSV[..., :n_vocabulary]) for logits_HSV in (b_HSV, a_HSV))
        figures = [kl_N(b_NV, plain_NV)]
        for vectors_NPD in added:
            delta_BPD = torch.einsum("bn,npd->bpd", a_BN, vectors_NPD)
            with_NV = part.predictions(_logits_with(splicer_a, part, delta_BPD, hookpoints)[..., :n_vocabulary])
            figures.append(kl_N(b_NV, with_NV))
        sums.add(part, torch.stack(figures, 1).cpu(), torch.ones(len(b_NV), dtype=torch.bool))
    found = sums.result()
    if not found.n_tokens:
        raise InputError("closes: the held-out text has no prediction to look at")
    if found.share is None:
        raise InputError("closes: both language models predict the same, so there is nothing to close")
    return found


class _Sums:
    """For each sequence the number of predictions, KL as it is, and KL with each of what is added; in all and for each group."""

    def __init__(self, latents: list[int], groupings: Groupings | None = None):
        self._latents = latents
        self._sums_HF: list[Tensor] = []
        self._groups = ByGroup(groupings, partial(_Sums, latents))

    def add(self, part: TextPart, figure_NF: Tensor, counted_N: Tensor) -> None:
        figure_NF = torch.cat([torch.ones(len(figure_NF), 1), figure_NF], 1)
        self._sums_HF.append(part.by_sequence(figure_NF.where(counted_N[:, None], 0)))
        for sums, of_group_N in self._groups.of(part.predicted_groups()):
            sums.add(part, figure_NF[:, 1:], of_group_N)

    def result(self) -> Closes:
        sums_QF = torch.cat(self._sums_HF) if self._sums_HF else torch.zeros(0, 3)
        sums_QF = sums_QF[sums_QF[:, 0] > 0]
        n, kl, kl_closed, *kl_random = sums_QF.sum(0).tolist()
        interval, random_shares = None, [1 - one / kl for one in kl_random if kl > 0]
        if len(sums_QF) > 1 and kl > 0:
            means_RF = resampled_means(sums_QF[:, 0], sums_QF[:, 1:3])
            interval = interval_95(1 - means_RF[:, 1] / means_RF[:, 0])
        return Closes(
            latents=self._latents,
            n_tokens=int(n),
            kl=kl / max(n, 1),
            kl_closed=kl_closed / max(n, 1),
            share=1 - kl_closed / kl if kl > 0 else None,
            share_ci95=interval,
            random_shares=random_shares,
            random_share=fmean(random_shares) if random_shares else None,
            groups=self._groups.result(_Sums.result),
        )


def _logits_with(splicer: Splicer, part: TextPart, delta_BPD: Tensor, hookpoints: Sequence[int]) -> Tensor:
    delta_HSPD = part.everywhere(delta_BPD)

    def add(act: Tensor, i: int) -> Tensor:
        return act + delta_HSPD[:, :, i].to(act).reshape(act.shape)

    changes = {p: partial(add, i=i) for i, p in enumerate(hookpoints)}
    return splicer.logits_changed(part.tokens_HS, part.segments_HS, changes)
