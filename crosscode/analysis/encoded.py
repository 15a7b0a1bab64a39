"""One pass over held-out activations, shared by everything that wants to see them.

Axes: H sequences of a batch · S positions in a sequence · B usable tokens · M models · P hookpoints · D width
Xi/Xo input/output crosscoding dims · X = flattened Xo · L latents · N active entries of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, Self

import torch
from crosscode_kernels.sparse import DenseLatents, Latents
from torch import Tensor

from crosscode.analysis.geometry import output_scaling_X
from crosscode.analysis.reads import read_NR
from crosscode.errors import InputError
from crosscode.models.base import BaseCrosscoder
from crosscode.models.split import Split


class OtherTokens(Protocol):
    """The same sequences in another tokenizer's tokens (T positions), and the partner of each of the first one's positions."""

    @property
    def tokens_HT(self) -> Tensor: ...
    @property
    def usable_HT(self) -> Tensor: ...
    @property
    def place_HS(self) -> Tensor: ...
    def __getitem__(self, rows: Any) -> Self: ...


class HeldoutBatch(Protocol):
    """Tokens with the raw activations that the language models have there."""

    @property
    def tokens_HS(self) -> Tensor: ...
    @property
    def mask_HS(self) -> Tensor: ...
    @property
    def acts_HSMPD(self) -> Tensor: ...


@dataclass(frozen=True)
class ActiveEntries:
    """The active latents of a batch: entry n says that latent `latent_N[n]` has `value_N[n] > 0` at token `token_N[n]`.

    Ordered by token. Nothing of size B x L is made from sparse latents.
    """

    token_N: Tensor
    latent_N: Tensor
    value_N: Tensor
    n_latents: int


def active_entries(latents: Latents) -> ActiveEntries:
    """Entries of either form of latents; stored zeros are left out."""
    if isinstance(latents, DenseLatents):
        token_N, latent_N = (latents.value_BL > 0).nonzero(as_tuple=True)
        return ActiveEntries(token_N, latent_N, latents.value_BL[token_N, latent_N], latents.n_latents)
    keep_N = latents.value_N > 0
    return ActiveEntries(
        latents.token_idx_N()[keep_N], latents.latent_idx_N[keep_N].long(), latents.value_N[keep_N], latents.n_latents
    )


@dataclass(frozen=True)
class EncodedBatch:
    """Whole sequences, encoded. `target_BXD` and `output_BXD` are in the scale of training."""

    tokens_HS: Tensor
    first_sequence: int
    """number of sequences before this batch"""
    position_B: Tensor
    """`h * S + s` of each usable token"""
    entries: ActiveEntries
    target_BXD: Tensor
    output_BXD: Tensor
    group_BG: Tensor | None = None
    """numbers of each token's groups, in each way to group tokens; None: not known"""
    others: tuple[OtherTokens, ...] = ()
    """the same sequences in tokens of other tokenizers"""
    read_NR: Callable[[Tensor], Tensor] | None = None
    """what some entries (by number) read from each of the readers that were asked for"""


class Collector(Protocol):
    """Takes part in a pass over held-out data."""

    def update(self, batch: EncodedBatch) -> None: ...


@torch.no_grad()
def encode_heldout(
    model: BaseCrosscoder,
    batches: Iterable[HeldoutBatch],
    split: Split,
    max_tokens: int = 4096,
    readers: Sequence[Sequence[int]] = (),
) -> Iterator[EncodedBatch]:
    """Encode and reconstruct held-out data in eval mode, at most about `max_tokens` at a time. `readers`: input positions of
    each."""
    scaling_X1 = output_scaling_X(model)[:, None]
    like = model.parts[0].W_enc_LXiDi
    n_sequences = 0
    for batch in batches:
        _check(batch)
        rows = max(1, max_tokens // batch.tokens_HS.shape[1])
        group_HSG = getattr(batch, "group_HSG", None)  # [H, S, ways to group tokens], where they are known
        others = getattr(batch, "others", ())
        for start in range(0, batch.tokens_HS.shape[0], rows):
            tokens_HS, mask_HS = batch.tokens_HS[start : start + rows].cpu(), batch.mask_HS[start : start + rows].cpu()
            position_B = mask_HS.flatten().nonzero().squeeze(1)
            acts_BMPD = batch.acts_HSMPD[start : start + rows].flatten(0, 1)[position_B].to(like)
            input_BXiDi, target_BXoDo = split.activations(acts_BMPD)
            result = _forward_eval(model, input_BXiDi)
            entries = active_entries(result.latents)
            shape = (position_B.shape[0], len(model.segments), model.d_out)
            yield EncodedBatch(
                tokens_HS,
                n_sequences,
                position_B,
                entries,
                target_BXoDo.reshape(shape) * scaling_X1,
                result.output_BXoDo.reshape(shape) * scaling_X1,
                None if group_HSG is None else group_HSG[start : start + rows].flatten(0, 1)[position_B],
                tuple(other[start : start + rows] for other in others),
                partial(_read_NR, model, input_BXiDi, entries, readers),
            )
            n_sequences += tokens_HS.shape[0]


def collect(batches: Iterable[EncodedBatch], *collectors: Collector) -> int:
    """Show every batch to every collector. Returns the number of tokens seen."""
    n_tokens = 0
    for batch in batches:
        for collector in collectors:
            collector.update(batch)
        n_tokens += batch.position_B.shape[0]
    return n_tokens


def _forward_eval(model: BaseCrosscoder, input_BXiDi: Tensor):
    was_training = model.training
    model.eval()
    try:
        return model.forward_train(input_BXiDi)
    finally:
        model.train(was_training)


def _read_NR(
    model: BaseCrosscoder, x_BXiDi: Tensor, entries: ActiveEntries, readers: Sequence[Sequence[int]], some_N: Tensor
) -> Tensor:
    some_N = some_N.to(entries.token_N.device)
    return read_NR(model, x_BXiDi, entries.token_N[some_N], entries.latent_N[some_N], readers).cpu()


def _check(batch: HeldoutBatch) -> None:
    shape = tuple(batch.tokens_HS.shape)
    if len(shape) != 2 or tuple(batch.mask_HS.shape) != shape or tuple(batch.acts_HSMPD.shape[:2]) != shape:
        raise InputError(
            f"held-out batch: tokens_HS {shape}, mask_HS {tuple(batch.mask_HS.shape)} and acts_HSMPD "
            f"{tuple(batch.acts_HSMPD.shape)} must agree in H and S"
        )
