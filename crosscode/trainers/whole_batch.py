"""What a batch in parts must know of the whole: so that the parts add up to the same update.

A first pass over the parts, without gradients, finds
- where the selection of BatchTopK ends: each part offers its `k * B` largest latents, and the `k * B`-th largest of all
  offers is the value that a latent of any part must reach. Of equal ones the first of the batch are kept;
- which latents fire, and with them which are dead;
- the variances of the reconstruction error and of the target, by which AuxK and normalised terms divide.

Axes: B tokens of the whole batch · X crosscoding positions · Xi/Xo input/output crosscoding dims · Di/Do widths ·
O flattened output · L latents · N stored entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import NamedTuple

import torch
from crosscode_kernels.sparse import Latents, SparseLatents
from torch import Tensor

from crosscode.models.activations.batch_topk import Cut
from crosscode.models.base import BaseCrosscoder
from crosscode.objectives.base import Objective, WholeBatch


def needs_whole_batch(model: BaseCrosscoder, objective: Objective) -> bool:
    """Whether parts of a batch, each on its own, would give another update than the whole."""
    terms = [term for term, _ in objective.terms.values()]
    return any(fn.selects_over_batch for fn in model.activation_fns) or any(term.needs_whole_batch for term in terms)


def tracks_batches(model: BaseCrosscoder) -> bool:
    """Whether an activation keeps statistics of whole batches."""
    return any(fn.tracks_batches for fn in model.activation_fns)


OfPart = Callable[[int], AbstractContextManager[object]]
"""Within the block for part i of a batch, BatchTopK selects in it what it would select in the whole batch."""


def batch_cuts(
    model: BaseCrosscoder,
    objective: Objective,
    inputs: Sequence[Tensor],
    autocast: Callable[[], AbstractContextManager[object]],
) -> OfPart:
    """For the parts `inputs` of a batch."""
    if not any(fn.selects_over_batch for fn in model.activation_fns):
        return lambda i: nullcontext()
    factors = {1, *(factor for term, _ in objective.terms.values() for factor in term.k_factors)}
    with autocast():
        cuts = {factor: _cuts(model, inputs, factor) for factor in sorted(factors)}

    @contextmanager
    def of_part(i: int) -> Iterator[None]:
        before = sum(input_.shape[0] for input_ in inputs[:i]) * model.n_latents
        with ExitStack() as stack:
            for a, activation in enumerate(model.activation_fns):
                own = {factor: replace(found[a], end=found[a].end - before) for factor, found in cuts.items()}
                stack.enter_context(activation.batch_cuts_set(own))
            yield

    return of_part


@torch.no_grad()
def _cuts(model: BaseCrosscoder, inputs: Sequence[Tensor], factor: int) -> list[Cut]:
    """For each activation, with places that are counted through the whole batch."""
    offers, groups, kept = _offers(model, inputs, factor, len(inputs))
    norms_L, cuts, first_latent = _norms_L(model), list[Cut](), 0
    for group, k in zip(groups, kept, strict=True):
        rank_N = torch.cat([_ranks(latents, norms_L, group.own) for latents in offers])
        n_kept = k * sum(input_.shape[0] for input_ in inputs)
        threshold = _kth_largest(rank_N, n_kept)
        place_N, n_before = list[Tensor](), 0
        for latents in offers:
            place_N.append(_places(latents, group.own) + n_before)
            n_before += latents.batch_size * model.n_latents
        end = _end_of_ties(rank_N, torch.cat(place_N), threshold, n_kept)
        for part in group.parts:
            cuts.append(Cut(threshold, end - first_latent, model.n_latents))
            first_latent += part.n_latents
    return cuts


@torch.no_grad()
def thresholds_over(
    model: BaseCrosscoder, inputs: Sequence[Tensor], factor: int, n_offered: int
) -> tuple[list[Tensor], Tensor | None]:
    """For each activation the smallest value that the whole of `inputs` keeps, 0 where that is everything positive.

    Each part offers `n_offered` times what it may keep on average. With as many as there are parts that is exact. With
    fewer, the second result (a bool on the device) says whether it was enough.
    """
    n_tokens = sum(input_.shape[0] for input_ in inputs)
    offers, groups, kept = _offers(model, inputs, factor, n_offered)
    norms_L, thresholds, enough = _norms_L(model), list[Tensor](), None
    for group, k in zip(groups, kept, strict=True):
        ranks = [_ranks(latents, norms_L, group.own) for latents in offers]
        threshold = _kth_largest(torch.cat(ranks), k * n_tokens)
        thresholds += [threshold] * len(group.parts)
        if n_offered < len(inputs) and group.k < group.own.stop - group.own.start:
            counts = torch.stack([((rank_N >= threshold) & (rank_N > 0)).sum() for rank_N in ranks])
            most = torch.tensor([input_.shape[0] * group.k for input_ in inputs], device=counts.device)
            enough = (counts < most).all() & (True if enough is None else enough)
    return thresholds, enough


class _Group(NamedTuple):
    """Latents that are ranked together, the parts of the model that they are of, and how many a token keeps on average."""

    own: slice
    parts: Sequence[BaseCrosscoder]
    k: int


def _offers(
    model: BaseCrosscoder, inputs: Sequence[Tensor], factor: int, n_offered: int
) -> tuple[list[Latents], list[_Group], list[int]]:
    """What each part offers, in which groups it is ranked, and how many of each group a token keeps on average."""
    with model.k_multiplied(factor * n_offered):
        offers, groups = [model.encode_latents(input_BXiDi) for input_BXiDi in inputs], _groups(model)
    with model.k_multiplied(factor):
        return offers, groups, [group.k for group in _groups(model)]


def _groups(model: BaseCrosscoder) -> list[_Group]:
    activations = model.activation_fns
    if model.selects_over_parts:
        return [_Group(slice(0, model.n_latents), model.parts, min(activations[0].wanted_k, model.n_latents))]
    groups, start = list[_Group](), 0
    for part, activation in zip(model.parts, activations, strict=True):
        groups.append(_Group(slice(start, start + part.n_latents), [part], activation.current_k))
        start += part.n_latents
    return groups


def _norms_L(model: BaseCrosscoder) -> Tensor | None:
    """What latents are multiplied by for their ranking; None: 1."""
    return model.ranking_norms_L() if any(fn.uses_decoder_norms for fn in model.activation_fns) else None


def _ranks(latents: Latents, norms_L: Tensor | None, own: slice) -> Tensor:
    """Ranking values of the latents `own`, 0 for others."""
    if isinstance(latents, SparseLatents):
        scale_N = 1 if norms_L is None else norms_L[latents.latent_idx_N.long()]
        is_own_N = (latents.latent_idx_N >= own.start) & (latents.latent_idx_N < own.stop)
        return torch.where(is_own_N, latents.value_N * scale_N, 0)
    return (latents.value_BL[:, own] * (1 if norms_L is None else norms_L[own])).flatten()


def _places(latents: Latents, own: slice) -> Tensor:
    """Where the values of `_ranks` stand in a batch, counted token by token."""
    if isinstance(latents, SparseLatents):
        return latents.token_idx_N() * latents.n_latents + latents.latent_idx_N.long()
    place_BL = torch.arange(latents.batch_size * latents.n_latents, device=latents.value_BL.device)
    return place_BL.view(latents.batch_size, -1)[:, own].flatten()


def _kth_largest(rank_N: Tensor, k: int) -> Tensor:
    """0 where there are fewer positive ones."""
    return rank_N.topk(k).values[-1] if k <= rank_N.shape[0] else rank_N.new_zeros(())


def _end_of_ties(rank_N: Tensor, place_N: Tensor, threshold: Tensor, n_kept: int) -> Tensor:
    """The place behind the last that is kept of those that equal the threshold."""
    if not rank_N.numel():
        return place_N.new_zeros(())
    place_N = torch.where(rank_N == threshold, place_N, place_N.max() + 1).sort().values
    n_ties = (n_kept - (rank_N > threshold).sum()).clamp(1, place_N.shape[0])
    return place_N.index_select(0, n_ties.view(1) - 1).squeeze(0) + 1  # an index by a tensor would be read by the host


@torch.no_grad()
def look_at_whole_batch(
    model: BaseCrosscoder, inputs: Sequence[Tensor], targets: Sequence[Tensor], of_part: OfPart
) -> tuple[Tensor, WholeBatch]:
    """The first pass; `of_part`: from `batch_cuts`. The first result: on how many tokens each latent is active."""
    counts_L, of_error, of_target = None, _Moments(), _Moments()
    for i, (input_BXiDi, target_BXoDo) in enumerate(zip(inputs, targets, strict=True)):
        with of_part(i):
            forward = model.forward_train(input_BXiDi)
        part_counts_L = forward.latents.firing_counts_L()
        counts_L = part_counts_L if counts_L is None else counts_L + part_counts_L
        of_error.add((target_BXoDo - forward.output_BXoDo).flatten(1))
        of_target.add(target_BXoDo.flatten(1))
    assert counts_L is not None
    share_L = counts_L / sum(input_.shape[0] for input_ in inputs)
    return counts_L, WholeBatch(of_error.variance(), of_target.variance(), share_L)


class _Moments:
    """Variance over tokens, summed over O, of rows that come in parts (Chan et al. 1979: no cancellation)."""

    def __init__(self) -> None:
        self._n = 0
        self._mean_O: Tensor | None = None
        self._squares: Tensor | float = 0.0

    def add(self, rows_BO: Tensor) -> None:
        n, mean_O = rows_BO.shape[0], rows_BO.mean(0)
        squares = (rows_BO - mean_O).square().sum()
        if self._mean_O is None:
            self._n, self._mean_O, self._squares = n, mean_O, squares
            return
        delta_O, total = mean_O - self._mean_O, self._n + n
        self._squares = self._squares + squares + delta_O.square().sum() * (self._n * n / total)
        self._mean_O = self._mean_O + delta_O * (n / total)
        self._n = total

    def variance(self) -> Tensor:
        return torch.as_tensor(self._squares) / max(self._n, 1)
