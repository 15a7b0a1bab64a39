"""What is shown of every latent beyond its row in the table, collected in the same pass over held-out text.

Axes: H sequences · S positions · B usable tokens · X output positions (flattened) · D width · L latents ·
N active entries · K neighbours · V vocabulary · E ends of a list of logits.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from torch import Tensor

from crosscode.analysis.encoded import EncodedBatch, HeldoutBatch
from crosscode.analysis.example_pool import Example
from crosscode.analysis.geometry import decoder_vectors_LXD
from crosscode.analysis.latents_pass import LatentsPass, study_latents
from crosscode.analysis.tokens import DisplayToken, TokenDisplay
from crosscode.groups import Groupings
from crosscode.models.base import BaseCrosscoder
from crosscode.models.decoder_vectors import decoder_vectors_NXD
from crosscode.models.split import Split

Unembed = Callable[[Tensor], Tensor]
"""Vectors [N, D] -> logits [N, V]."""
MAX_LOGIT_POSITIONS = 4
_CHUNK = 256


class Histograms:
    """Counts each latent's activations in equal bins from 0 to `upper_L`, exactly: a latent that goes beyond its range
    has it doubled, and its bins joined in twos."""

    def __init__(self, n_latents: int, n_bins: int = 64):
        self.upper_L = np.zeros(n_latents)
        self.counts_LN = np.zeros((n_latents, n_bins), np.int64)

    def update(self, batch: EncodedBatch) -> None:
        latent_N = batch.entries.latent_N.cpu().numpy()
        value_N = batch.entries.value_N.double().cpu().numpy()
        n_latents, n_bins = self.counts_LN.shape
        largest_L = np.zeros(n_latents)
        np.maximum.at(largest_L, latent_N, value_N)
        new_L = (self.upper_L == 0) & (largest_L > 0)
        self.upper_L[new_L] = largest_L[new_L]
        while len(wide := np.flatnonzero(largest_L > self.upper_L)):
            joined = self.counts_LN[wide].reshape(len(wide), n_bins // 2, 2).sum(2)
            self.counts_LN[wide] = np.concatenate([joined, np.zeros_like(joined)], axis=1)
            self.upper_L[wide] *= 2
        bin_N = np.minimum((value_N / self.upper_L[latent_N] * n_bins).astype(np.int64), n_bins - 1)
        self.counts_LN += np.bincount(latent_N * n_bins + bin_N, minlength=n_latents * n_bins).reshape(
            n_latents, n_bins
        )


class Texts:
    """Keeps the tokens that were read, and by number of another tokenizer its own, each sequence with the partners of the first
    one's positions (-1: none)."""

    def __init__(self) -> None:
        self.sequences: list[NDArray[np.int64]] = []
        self.others: dict[int, list[tuple[NDArray[np.int64], NDArray[np.int64]]]] = {}

    def update(self, batch: EncodedBatch) -> None:
        self.sequences.extend(batch.tokens_HS.cpu().numpy().astype(np.int64))
        for number, other in enumerate(batch.others):
            rows = zip(other.tokens_HT, other.usable_HT, other.place_HS, strict=True)
            self.others.setdefault(number, []).extend(
                (tokens_T[: int(usable_T.nonzero().max()) + 1].numpy(), place_S.numpy())
                for tokens_T, usable_T, place_S in rows
            )

    def in_others(self, tokenizers: Mapping[str, Any]) -> list[OtherText]:
        """In the tokens of all tokenizers but the first, which are given by the names of their models."""
        first, *rest = tokenizers or [""]
        return [OtherText(one, first, TokenDisplay(tokenizers[one]), self.others[i]) for i, one in enumerate(rest)]


@dataclass(frozen=True)
class OtherText:
    """The text in the tokens of another tokenizer, for the models that read these; sequences as `Texts.others` has them."""

    names: str
    beside: str
    """names of the models that read the first tokenizer's tokens"""
    display: TokenDisplay
    rows: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]]

    def at(self, example: Example) -> int:
        """The token at an example's peak."""
        tokens_T, place_S = self.rows[example.sequence]
        return int(tokens_T[place_S[example.position]])

    def shown(self, example: Example) -> list[DisplayToken]:
        """An example's window, from its first partner to its last, each with the strength there."""
        tokens_T, place_S = self.rows[example.sequence]
        first = example.position - example.peak
        places = place_S[first : first + len(example.tokens)].tolist()
        strength_at = {place: one for place, one in zip(places, example.strengths, strict=True) if place >= 0}
        begin, end = min(strength_at), max(strength_at) + 1
        strengths = [strength_at.get(place, 0.0) for place in range(begin, end)]
        return self.display(tokens_T[begin:end].tolist(), strengths, places[example.peak] - begin)


class CoFiring:
    """Keeps which latents fire together on the first tokens, up to `max_entries` entries."""

    def __init__(self, n_latents: int, max_entries: int = 2_000_000):
        self._n_latents, self._room, self._n_tokens = n_latents, max_entries, 0
        self._token_N: list[NDArray] = []
        self._latent_N: list[NDArray] = []

    def update(self, batch: EncodedBatch) -> None:
        entries = batch.entries
        if self._room <= 0:
            return
        self._token_N.append((entries.token_N.cpu().numpy() + self._n_tokens).astype(np.int32))
        self._latent_N.append(entries.latent_N.cpu().numpy().astype(np.int32))
        self._room -= len(entries.token_N)
        self._n_tokens += batch.position_B.shape[0]

    def nearest(self, n: int) -> Neighbours:
        """By `n_ij / sqrt(n_i n_j)` of the tokens on which both fire."""
        none = [np.zeros(0, np.int32)]
        place = (np.concatenate(self._latent_N or none), np.concatenate(self._token_N or none))
        fires_LB = csr_matrix(
            (np.ones(len(place[0]), np.float32), place), shape=(self._n_latents, max(self._n_tokens, 1))
        )
        norm_L = np.sqrt(np.maximum(np.asarray(fires_LB.sum(1)).ravel(), 1))
        fires_BL = fires_LB.T.tocsr()

        def similarity(start: int, stop: int) -> Tensor:
            both = (fires_LB[start:stop] @ fires_BL).toarray()
            return torch.from_numpy(both / norm_L[start:stop, None] / norm_L[None])

        return _nearest(similarity, self._n_latents, n)


@dataclass(frozen=True)
class Neighbours:
    """The most similar other latents, best first."""

    latent_LK: Tensor
    similarity_LK: Tensor

    def of(self, latent: int) -> list[tuple[int, float]]:
        """Those with any similarity."""
        pairs = zip(self.latent_LK[latent].tolist(), self.similarity_LK[latent].tolist(), strict=True)
        return [(other, value) for other, value in pairs if value > 0]


@dataclass(frozen=True)
class LogitEnds:
    """The largest and the smallest logits of every latent at one output position, outermost first."""

    top_id_LE: Tensor
    top_LE: Tensor
    bottom_id_LE: Tensor
    bottom_LE: Tensor
    writes_L: Tensor
    """whether the latent has a decoder vector there"""
    display: TokenDisplay | None = field(default=None, kw_only=True)
    """of tokens that are not the text's: the language model has a tokenizer of its own"""


@dataclass(frozen=True)
class LatentRecords:
    """Of every latent; see `study_records`."""

    histograms: Histograms
    texts: Texts
    by_decoder: Neighbours
    by_firing: Neighbours
    logits: dict[str, LogitEnds] = field(default_factory=dict)
    """by name of the output position; of positions outside the residual stream nothing"""


def study_records(
    model: BaseCrosscoder,
    heldout: Iterable[HeldoutBatch],
    split: Split,
    position_names: Sequence[str],
    unembeds: Mapping[int, Unembed] = MappingProxyType({}),
    n_neighbours: int = 8,
    n_logits: int = 10,
    groupings: Groupings | None = None,
    displays: Mapping[int, TokenDisplay] = MappingProxyType({}),
) -> tuple[LatentsPass, LatentRecords]:
    """`study_latents` and the records of every latent, in one pass. Memory: some KB for each latent, and the tokens.

    Args:
        unembeds: of output positions, from vectors there to logits; others have no logits.
        groupings: as of `study_latents`.
        displays: of output positions whose language model has a tokenizer of its own.
    """
    histograms, texts, together = Histograms(model.n_latents), Texts(), CoFiring(model.n_latents)
    more = (histograms, texts, together)
    study = study_latents(model, heldout, split, position_names, more=more, groupings=groupings)
    logits: dict[str, LogitEnds] = {}
    for x in logit_positions(model, position_names, unembeds):
        logits[position_names[x]] = replace(logit_ends(model, x, unembeds[x], n_logits), display=displays.get(x))
    by_decoder, by_firing = nearest_by_decoder(model, n_neighbours), together.nearest(n_neighbours)
    return study, LatentRecords(histograms, texts, by_decoder, by_firing, logits)


def logit_positions(model: BaseCrosscoder, names: Sequence[str], readable: Container[int] | None = None) -> list[int]:
    """All output positions that are readable (default: every one), or of many the last of each model and of each part."""
    found = [x for x in range(len(names)) if readable is None or x in readable]
    if len(found) <= MAX_LOGIT_POSITIONS:
        return found
    last = {names[x].rpartition("/")[0]: x for x in found}
    of_parts = [[x for x in found if outputs.start <= x < outputs.stop] for outputs in model.outputs_of_parts]
    return sorted({*last.values(), *(of_part[-1] for of_part in of_parts if of_part)})


@torch.no_grad()
def logit_ends(model: BaseCrosscoder, x: int, unembed: Unembed, n: int) -> LogitEnds:
    """Of the raw decoder vectors at output position x; float32, on the CPU."""
    found: list[tuple[Tensor, ...]] = []
    device = model.parts[0].W_dec_LXoDo.device
    for start in range(0, model.n_latents, _CHUNK):
        latents_N = torch.arange(start, min(start + _CHUNK, model.n_latents), device=device)
        vectors_ND = decoder_vectors_NXD(model, latents_N)[:, x]
        writes_N = vectors_ND.any(1)
        logits_NV = unembed(vectors_ND[writes_N])
        k = min(n, logits_NV.shape[1])
        top, bottom = logits_NV.topk(k), logits_NV.topk(k, largest=False)
        columns = (top.indices, top.values, bottom.indices, bottom.values)
        found.append((*(_spread(column, writes_N) for column in columns), writes_N.cpu()))
    return LogitEnds(*(torch.cat(column) for column in zip(*found, strict=True)))


def _spread(rows_KE: Tensor, place_N: Tensor) -> Tensor:
    """Rows at the places that are set, zeros at the others; on the CPU."""
    rows_NE = rows_KE.new_zeros(place_N.shape[0], rows_KE.shape[1])
    rows_NE[place_N] = rows_KE
    return rows_NE.cpu()


@torch.no_grad()
def nearest_by_decoder(model: BaseCrosscoder, n: int) -> Neighbours:
    """By cosine of the decoder vectors of all output positions put together, in the scale of training."""
    W_LF = torch.nn.functional.normalize(decoder_vectors_LXD(model).float().flatten(1))
    return _nearest(lambda start, stop: W_LF[start:stop] @ W_LF.T, model.n_latents, n)


def _nearest(similarity: Callable[[int, int], Tensor], n_latents: int, n: int) -> Neighbours:
    parts: list[tuple[Tensor, Tensor]] = []
    for start in range(0, n_latents, _CHUNK):
        stop = min(start + _CHUNK, n_latents)
        similarity_NL = similarity(start, stop)
        similarity_NL[torch.arange(stop - start), torch.arange(start, stop)] = -torch.inf
        best = similarity_NL.topk(min(n, n_latents - 1))
        parts.append((best.indices.cpu(), best.values.float().cpu()))
    return Neighbours(*(torch.cat(column) for column in zip(*parts, strict=True)))
