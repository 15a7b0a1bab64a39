"""What a batch in parts must know of the whole: so that the parts add up to the same update.

A first pass over the parts, without gradients, finds
- the thresholds of BatchTopK: each part offers its `k * B` largest latents, and the `k * B`-th largest of all offers is
  the value that a latent of any part must reach;
- which latents fire, and with them which are dead;
- the variances of the reconstruction error and of the target, by which AuxK and normalised terms divide.

Axes: B tokens of the whole batch · X crosscoding positions · Xi/Xo input/output crosscoding dims · Di/Do widths ·
O flattened output · L latents · N stored entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace

import torch
from crosscode_kernels.sparse import DenseLatents, Latents, SparseLatents
from torch import Tensor

from crosscode.models.base import BaseCrosscoder
from crosscode.objectives.base import Objective, WholeBatch


def needs_whole_batch(model: BaseCrosscoder, objective: Objective) -> bool:
    """Whether parts of a batch, each on its own, would give another update than the whole."""
    terms = [term for term, _ in objective.terms.values()]
    return any(fn.selects_over_batch for fn in model.activation_fns) or any(term.needs_whole_batch for term in terms)


def tracks_batches(model: BaseCrosscoder) -> bool:
    """Whether an activation keeps statistics of whole batches."""
    return any(fn.tracks_batches for fn in model.activation_fns)


@contextmanager
def batch_thresholds(
    model: BaseCrosscoder,
    objective: Objective,
    inputs: Sequence[Tensor],
    autocast: Callable[[], AbstractContextManager[object]],
) -> Iterator[None]:
    """Within the block, BatchTopK selects in each part what it would select in the whole batch."""
    activations = [fn for fn in model.activation_fns if fn.selects_over_batch]
    factors = sorted({1, *(factor for term, _ in objective.terms.values() for factor in term.k_factors)})
    with ExitStack() as stack:
        if activations:
            with autocast():
                found = {factor: thresholds_over(model, inputs, factor, len(inputs))[0] for factor in factors}
            for i, activation in enumerate(activations):
                own = {factor: found[factor][i] for factor in factors}
                stack.enter_context(activation.batch_thresholds_set(own))
        yield


@torch.no_grad()
def thresholds_over(
    model: BaseCrosscoder, inputs: Sequence[Tensor], factor: int, n_offered: int
) -> tuple[list[Tensor], Tensor | None]:
    """For each activation the smallest value that the whole of `inputs` keeps, 0 where that is everything positive.

    Each part offers `n_offered` times what it may keep on average. With as many as there are parts that is exact. With
    fewer, the second result (a bool on the device) says whether it was enough.
    """
    n_tokens = sum(input_.shape[0] for input_ in inputs)
    with model.k_multiplied(factor * n_offered):
        offers = [model.encode_latents(input_BXiDi) for input_BXiDi in inputs]
        offered = _groups(model)
    with model.k_multiplied(factor):
        kept = _groups(model)
    norms_L = model.ranking_norms_L() if any(fn.uses_decoder_norms for fn in model.activation_fns) else None
    thresholds, enough = [], None
    for (own, k), (_, k_offered) in zip(kept, offered, strict=True):
        ranks = [_ranks(latents, norms_L, own) for latents in offers]
        thresholds.append(threshold := _kth_largest(torch.cat(ranks), k * n_tokens))
        if n_offered < len(inputs) and k_offered < own.stop - own.start:
            counts = torch.stack([((rank_N >= threshold) & (rank_N > 0)).sum() for rank_N in ranks])
            most = torch.tensor([input_.shape[0] * k_offered for input_ in inputs], device=counts.device)
            enough = (counts < most).all() & (True if enough is None else enough)
    return thresholds * (len(model.parts) // len(thresholds)), enough


def _groups(model: BaseCrosscoder) -> list[tuple[slice, int]]:
    """The latents that are ranked together, and how many of them a token keeps on average."""
    activations = model.activation_fns
    if model.selects_over_parts:
        return [(slice(0, model.n_latents), min(activations[0].wanted_k, model.n_latents))]
    groups, start = [], 0
    for part, activation in zip(model.parts, activations, strict=True):
        groups.append((slice(start, start + part.n_latents), activation.current_k))
        start += part.n_latents
    return groups


def _ranks(latents: Latents, norms_L: Tensor | None, own: slice) -> Tensor:
    """Ranking values of the latents `own`, 0 for others."""
    if isinstance(latents, SparseLatents):
        scale_N = 1 if norms_L is None else norms_L[latents.latent_idx_N.long()]
        is_own_N = (latents.latent_idx_N >= own.start) & (latents.latent_idx_N < own.stop)
        return torch.where(is_own_N, latents.value_N * scale_N, 0)
    return (latents.value_BL[:, own] * (1 if norms_L is None else norms_L[own])).flatten()


def _kth_largest(rank_N: Tensor, k: int) -> Tensor:
    """0 where there are fewer positive ones."""
    return rank_N.topk(k).values[-1] if k <= rank_N.shape[0] else rank_N.new_zeros(())


@torch.no_grad()
def look_at_whole_batch(
    model: BaseCrosscoder, inputs: Sequence[Tensor], targets: Sequence[Tensor]
) -> tuple[Tensor, WholeBatch]:
    """The first pass; BatchTopK must have its thresholds already. The first result: on how many tokens each latent is active."""
    counts_L, of_error, of_target = None, _Moments(), _Moments()
    for input_BXiDi, target_BXoDo in zip(inputs, targets, strict=True):
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


def concat_tokens(parts: Sequence[Latents]) -> Latents:
    """The latents of a batch from those of its parts, detached."""
    if len(parts) == 1:
        return parts[0]
    sparse = [part for part in parts if isinstance(part, SparseLatents)]
    if len(sparse) < len(parts):
        return DenseLatents(torch.cat([part.to_dense().detach() for part in parts]))
    offsets, n_entries = [sparse[0].row_ptr_B1[:1]], 0
    for part in sparse:
        offsets.append(part.row_ptr_B1[1:] + n_entries)
        n_entries += part.value_N.shape[0]
    return replace(
        sparse[0],
        row_ptr_B1=torch.cat(offsets),
        latent_idx_N=torch.cat([part.latent_idx_N for part in sparse]),
        value_N=torch.cat([part.value_N.detach() for part in sparse]),
        by_latent=None,
        deficit_L=None,
        preacts_N=None,
    )
