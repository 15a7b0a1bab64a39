"""The best examples of each latent, kept while text streams by; see `examples`, which chooses what is best.

Axes: H sequences of a batch · S positions in a sequence · N active entries · C candidates · W context window
L latents · R readers (see `reads`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

import numpy as np
import torch
from numpy.typing import NDArray

from crosscode.analysis.encoded import EncodedBatch
from crosscode.errors import InputError

PADDING = -1
_DISTINCT_RADIUS = 4
"""Tokens to either side of the peak that must differ between two examples of one latent."""


@dataclass(frozen=True)
class Example:
    """One context. `strengths[i]` is the latent's value at `tokens[i]`; the peak is at index `peak`."""

    latent: int
    value: float
    sequence: int
    position: int
    tokens: list[int]
    strengths: list[float]
    peak: int
    read: list[list[float]] = field(default_factory=list)
    """what the latent reads from each reader at each token, 0 where it is not active; empty without readers"""


@dataclass
class _Rows:
    """Candidates or kept examples, one row each, in columns."""

    latent_C: NDArray[np.int64]
    rank_C: NDArray[np.float64]
    """examples with the largest rank are kept"""
    value_C: NDArray[np.float32]
    sequence_C: NDArray[np.int64]
    position_C: NDArray[np.int64]
    core_C: NDArray[np.uint64]
    """hash of the tokens right around the peak"""
    place_C: NDArray[np.int64]
    """of a kept example its window; of a candidate -1 - its entry in the batch"""

    def take(self, index: NDArray) -> _Rows:
        return _Rows(*(getattr(self, f.name)[index] for f in fields(self)))

    def joined(self, other: _Rows) -> _Rows:
        return _Rows(*(np.concatenate([getattr(self, f.name), getattr(other, f.name)]) for f in fields(self)))


_NO_ROWS = _Rows(
    latent_C=np.zeros(0, np.int64),
    rank_C=np.zeros(0, np.float64),
    value_C=np.zeros(0, np.float32),
    sequence_C=np.zeros(0, np.int64),
    position_C=np.zeros(0, np.int64),
    core_C=np.zeros(0, np.uint64),
    place_C=np.zeros(0, np.int64),
)


class _Windows:
    """Tokens, strengths and what is read around kept examples. Each is written once; where it is given back another follows."""

    def __init__(self, width: int, n_readers: int):
        self.tokens_CW = np.zeros((0, width), np.int32)
        self.strengths_CW = np.zeros((0, width), np.float32)
        self.read_CWR = np.zeros((0, width, n_readers), np.float32)
        self._free = np.zeros(0, np.int64)

    def give_back(self, place_C: NDArray[np.int64]) -> None:
        self._free = np.concatenate([self._free, place_C])

    def add(self, tokens_CW: NDArray, strengths_CW: NDArray, read_CWR: NDArray) -> NDArray[np.int64]:
        """The places that they got."""
        n, n_places = len(tokens_CW), len(self.tokens_CW)
        if n > len(self._free):
            n_new = max(n - len(self._free), n_places // 2)
            self._free = np.concatenate([self._free, n_places + np.arange(n_new)])
            for name in ("tokens_CW", "strengths_CW", "read_CWR"):
                old_C = getattr(self, name)
                setattr(self, name, np.concatenate([old_C, np.zeros((n_new, *old_C.shape[1:]), old_C.dtype)]))
        place_C, self._free = self._free[:n], self._free[n:]
        self.tokens_CW[place_C], self.strengths_CW[place_C], self.read_CWR[place_C] = tokens_CW, strengths_CW, read_CWR
        return place_C


class Entries:
    """The entries of a batch as NumPy columns, and a way to look one up."""

    def __init__(self, batch: EncodedBatch):
        self.tokens_HS = batch.tokens_HS.cpu().numpy().astype(np.int64)
        flat_N = batch.position_B.cpu().numpy()[batch.entries.token_N.cpu().numpy()]
        self.latent_N = batch.entries.latent_N.cpu().numpy().astype(np.int64)
        self.value_N = batch.entries.value_N.float().cpu().numpy()
        self.row_N, self.position_N = np.divmod(flat_N, self.tokens_HS.shape[1])
        key_N = self.latent_N * self.tokens_HS.size + flat_N
        self._order_N = np.argsort(key_N, kind="stable")
        self._sorted_key_N = key_N[self._order_N]

    def tokens_around(self, index_C: NDArray, left: int, right: int) -> NDArray[np.int64]:
        """`tokens_CW` around some entries; `PADDING` beyond the sequence."""
        at_CW, inside_CW = self._around(index_C, left, right)
        return np.where(inside_CW, self.tokens_HS[self.row_N[index_C][:, None], at_CW], PADDING)

    def same_around(self, index_C: NDArray, left: int, right: int) -> NDArray[np.int64]:
        """`entry_CW`: the entries of each entry's latent around it; -1 where it is not active."""
        at_CW, inside_CW = self._around(index_C, left, right)
        place_CW = self.row_N[index_C][:, None] * self.tokens_HS.shape[1] + at_CW
        key_CW = self.latent_N[index_C][:, None] * self.tokens_HS.size + place_CW
        found_CW = np.searchsorted(self._sorted_key_N, key_CW).clip(0, len(self._sorted_key_N) - 1)
        hit_CW = inside_CW & (self._sorted_key_N[found_CW] == key_CW)
        return np.where(hit_CW, self._order_N[found_CW], -1)

    def _around(self, index_C: NDArray, left: int, right: int) -> tuple[NDArray, NDArray]:
        at_CW = self.position_N[index_C][:, None] + np.arange(-left, right + 1)
        n_cols = self.tokens_HS.shape[1]
        return at_CW.clip(0, n_cols - 1), (at_CW >= 0) & (at_CW < n_cols)


class ExamplePool:
    """Keeps the `n` examples of largest rank for each latent, with distinct cores. Memory: L * n windows."""

    def __init__(self, n_latents: int, n: int, left: int, right: int, n_readers: int):
        if n < 1 or left < 0 or right < 0:
            raise InputError(f"examples: n = {n} must be at least 1, left = {left} and right = {right} at least 0")
        self.n_latents, self.n, self.left, self.right = n_latents, n, left, right
        self._kept, self._is_sorted = _NO_ROWS, True
        self._windows = _Windows(left + 1 + right, n_readers)
        self._entry_rank_L = np.full(n_latents, -np.inf)

    def offer(self, batch: EncodedBatch, entries: Entries, index_C: NDArray, rank_C: NDArray) -> None:
        """Consider some entries of a batch."""
        good_C = rank_C > self._entry_rank_L[entries.latent_N[index_C]]
        index_C, rank_C = index_C[good_C], rank_C[good_C]
        if len(index_C) == 0:
            return
        new = _Rows(
            entries.latent_N[index_C],
            rank_C.astype(np.float64),
            entries.value_N[index_C],
            entries.row_N[index_C] + batch.first_sequence,
            entries.position_N[index_C],
            _hash_rows(entries.tokens_around(index_C, min(self.left, _DISTINCT_RADIUS), _DISTINCT_RADIUS)),
            -1 - index_C,
        )
        touched_L = np.zeros(self.n_latents, bool)
        touched_L[new.latent_C] = True
        stays_C = ~touched_L[self._kept.latent_C]
        merged = _in_order(self._kept.take(~stays_C).joined(new))
        best_C = self._best(merged.latent_C, merged.core_C)
        is_out_C = np.ones(len(merged.latent_C), bool)
        is_out_C[best_C] = False
        self._windows.give_back(merged.place_C[is_out_C & (merged.place_C >= 0)])
        merged = merged.take(best_C)
        is_new_C = merged.place_C < 0
        merged.place_C[is_new_C] = self._add_windows(batch, entries, -1 - merged.place_C[is_new_C])
        self._kept, self._is_sorted = self._kept.take(stays_C).joined(merged), False
        full_L = np.bincount(merged.latent_C, minlength=self.n_latents) >= self.n
        lowest_L = np.full(self.n_latents, np.inf)
        np.minimum.at(lowest_L, merged.latent_C, merged.rank_C)
        self._entry_rank_L = np.where(full_L, lowest_L, self._entry_rank_L)

    def _add_windows(self, batch: EncodedBatch, entries: Entries, index_C: NDArray) -> NDArray[np.int64]:
        entry_CW = entries.same_around(index_C, self.left, self.right)
        active_CW = entry_CW >= 0
        strengths_CW = np.where(active_CW, entries.value_N[entry_CW], np.float32(0))
        read_CWR = np.zeros((*entry_CW.shape, self._windows.read_CWR.shape[2]), np.float32)
        if read_CWR.size:
            assert batch.read_NR is not None
            read_CWR[active_CW] = batch.read_NR(torch.from_numpy(entry_CW[active_CW])).numpy()
        return self._windows.add(entries.tokens_around(index_C, self.left, self.right), strengths_CW, read_CWR)

    def _best(self, latent_C: NDArray, core_C: NDArray) -> NDArray:
        """Which n rows of each latent to keep, of rows ordered by latent and then from best to worst: of equal cores
        the first."""
        by_core_C = np.lexsort((core_C, latent_C))
        first_C = np.ones(len(by_core_C), bool)
        first_C[1:] = (np.diff(latent_C[by_core_C]) != 0) | (np.diff(core_C[by_core_C]) != 0)
        distinct_C = np.sort(by_core_C[first_C])
        return distinct_C[_rank_in_group(latent_C[distinct_C]) < self.n]

    def of(self, latent: int) -> range:
        """The examples of a latent by number, largest rank first."""
        if not self._is_sorted:
            self._kept, self._is_sorted = _in_order(self._kept), True
        return range(*np.searchsorted(self._kept.latent_C, [latent, latent + 1]).tolist())

    def places(self, some: range) -> list[tuple[float, int, int]]:
        """`(value, sequence, position)` of examples that follow each other."""
        own, kept = slice(some.start, some.stop), self._kept
        return list(
            zip(kept.value_C[own].tolist(), kept.sequence_C[own].tolist(), kept.position_C[own].tolist(), strict=True)
        )

    def example(self, number: int) -> Example:
        kept, place = self._kept, self._kept.place_C[number]
        inside_W = self._windows.tokens_CW[place] != PADDING
        return Example(
            int(kept.latent_C[number]),
            float(kept.value_C[number]),
            int(kept.sequence_C[number]),
            int(kept.position_C[number]),
            self._windows.tokens_CW[place][inside_W].tolist(),
            self._windows.strengths_CW[place][inside_W].tolist(),
            int(inside_W[: self.left].sum()),
            self._windows.read_CWR[place][inside_W].tolist() if self._windows.read_CWR.shape[2] else [],
        )


def _in_order(rows: _Rows) -> _Rows:
    """By latent, and from best to worst; of equal ranks what is earlier in the text comes first."""
    return rows.take(np.lexsort((rows.position_C, rows.sequence_C, -rows.rank_C, rows.latent_C)))


def _rank_in_group(sorted_group_C: NDArray) -> NDArray:
    """0, 1, 2, ... within each run of equal values."""
    index_C = np.arange(len(sorted_group_C))
    starts_C = np.ones(len(sorted_group_C), bool)
    starts_C[1:] = sorted_group_C[1:] != sorted_group_C[:-1]
    return index_C - np.maximum.accumulate(np.where(starts_C, index_C, 0))


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64, the finaliser (Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _hash_rows(x_CW: NDArray[np.int64]) -> NDArray[np.uint64]:
    h_C = np.full(x_CW.shape[0], 0x9E3779B97F4A7C15, np.uint64)
    for column_C in x_CW.T:
        h_C = mix(h_C + column_C.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return h_C
