"""Rows of one store in random order, with no table of them and in few reads.

The store is cut into blocks of `block` consecutive rows; the blocks are dealt at random into windows of equal size, of
at most `window` rows (the last has up to a block more); one window at a time is in memory and its rows are shuffled.
Every row comes once an epoch. With `block` = 1, or where one window holds the whole store, any order of all rows may
come out. Otherwise rows that lie side by side on disk share a window: of a row's neighbours in its block,
`(block - 1) * B / window` on average are in the same batch of B.

R rows of a window, as they lie on disk · B rows handed out · M models · P hookpoints · D model dimension.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from crosscode.data.permutation import permuted
from crosscode.data.store.format import Layout, PackedRows, unpack
from crosscode.seeds import derived_seed

_ROWS_AT_ONCE = 256


class RowStore(Protocol):
    """Rows of known number that can be read in any order: an `ActivationCache`, or arrays of the user's own."""

    @property
    def n_rows(self) -> int: ...
    @property
    def dims(self) -> tuple[int, int, int]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def layout(self) -> Layout: ...
    @property
    def is_remote(self) -> bool: ...
    def content(self) -> str:
        """Equal where the rows are, as far as that can be told."""
        ...

    def check_not_empty(self) -> None: ...
    def mean_norm_MP(self) -> torch.Tensor | None:
        """Where it is known without reading rows."""
        ...

    def read_ascending(self, index_R: np.ndarray, out: PackedRows | None = None) -> PackedRows: ...
    def read_rows(self, index_B: torch.Tensor) -> torch.Tensor: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class WindowedOrder:
    """The order of `n_rows` rows that `seed` names: what stands at a place depends on these numbers alone."""

    n_rows: int
    block: int
    window: int
    seed: int

    def bounds(self, place: int) -> tuple[int, int]:
        """First place of the window that `place` is in, and the first after it."""
        n_blocks = self.n_rows // self.block
        n_windows = max(1, -(-n_blocks // max(1, self.window // self.block)))
        size = max(1, -(-n_blocks // n_windows)) * self.block
        last = max(0, (n_blocks * self.block - 1) // size)
        index = min(place // size, last)
        return index * size, self.n_rows if index == last else (index + 1) * size

    def rows_R(self, first: int, end: int) -> torch.Tensor:
        """The rows of a window, ascending. Those that do not fill a block are in the last one."""
        place_R = torch.arange(first, end)
        n_blocks = self.n_rows // self.block
        n_whole = min(end, n_blocks * self.block) - first
        if n_whole > 0:
            block_R = permuted(place_R[: n_whole : self.block] // self.block, n_blocks, self.seed)
            row_R = block_R[:, None] * self.block + torch.arange(self.block)
            place_R[:n_whole] = row_R.sort(dim=0).values.flatten()
        return place_R

    def picks_B(self, first: int, end: int, place_B: torch.Tensor) -> torch.Tensor:
        """Which of the rows of the window from `first` to `end` stand at `place_B`."""
        return permuted(place_B - first, end - first, derived_seed(self.seed + 1, first))


class StoreWindow:
    """Reads a store in windowed order and keeps one window in memory, in the dtype on disk.

    A position in the middle of a window reads that window again. Of a remote store the next window is read while this one is
    used: two are in memory then.
    """

    def __init__(self, store: RowStore, *, block: int, window: int) -> None:
        self.store = store
        self.block = block
        self.window = window
        self._held: tuple[Any, ...] | None = None
        self._rows_R = PackedRows.empty(0, store.layout)
        self._spare_R = self._rows_R
        self._coming: tuple[Any, Future[PackedRows]] | None = None
        self._reader = ThreadPoolExecutor(1, "crosscode-window") if store.is_remote else None

    def read(self, place: int, n: int, *, n_rows: int, seed: int, then: int | None = None) -> torch.Tensor:
        """`acts_BMPD` at places `place` to `place + n` of the order of the store's first `n_rows` rows that `seed` names. `then`:
        the seed of the order that comes after.

        Raises StoreError as `ActivationCache.read_rows` does.
        """
        order = WindowedOrder(n_rows, self.block, self.window, seed)
        out_BMPD = torch.empty((n, *self.store.dims), dtype=self.store.dtype)
        done = 0
        while done < n:
            first, end = order.bounds(place + done)
            self._hold(order, first, end)
            self._read_ahead(order, end, then)
            n_here = min(n - done, end - place - done)
            places_B = torch.arange(place + done, place + done + n_here)
            self._take(order.picks_B(first, end, places_B).numpy(), out_BMPD[done : done + n_here])
            done += n_here
        return out_BMPD

    def _hold(self, order: WindowedOrder, first: int, end: int) -> None:
        is_whole = end - first == order.n_rows
        wanted = (order.n_rows,) if is_whole else (order, first)
        if self._held == wanted:
            return
        self._held = None
        if (coming := self._taken(wanted)) is not None:
            self._rows_R, self._spare_R = coming, self._rows_R
        else:
            rows_R, self._rows_R = self._rows_R, PackedRows.empty(0, self.store.layout)
            self._rows_R = self._filled(order, first, end, rows_R)
        self._held = wanted

    def _filled(self, order: WindowedOrder, first: int, end: int, rows_R: PackedRows) -> PackedRows:
        if rows_R.acts_RE.shape[0] < end - first:
            rows_R = PackedRows.empty(0, self.store.layout)
            rows_R = PackedRows.empty(end - first, self.store.layout)
        self.store.read_ascending(order.rows_R(first, end).numpy(), rows_R[: end - first])
        return rows_R

    def _read_ahead(self, order: WindowedOrder, first: int, then: int | None) -> None:
        if self._reader is None or self._coming is not None:
            return
        if first == order.n_rows:
            if then is None:
                return
            order, first = replace(order, seed=then), 0
        first, end = order.bounds(first)
        if end - first < order.n_rows:  # else it is this one
            rows_R, self._spare_R = self._spare_R, PackedRows.empty(0, self.store.layout)
            self._coming = (order, first), self._reader.submit(self._filled, order, first, end, rows_R)

    def _taken(self, wanted: Any) -> PackedRows | None:
        """What was read ahead, if it is that; in any case nothing is being read any more."""
        if self._coming is None:
            return None
        (what, future), self._coming = self._coming, None
        if what == wanted:
            return future.result()
        wait([future])
        return None

    def close(self) -> None:
        self._taken(None)

    def _take(self, picks_B: np.ndarray, out_BMPD: torch.Tensor) -> None:
        """On the CPU by numpy: see `ShuffleBuffer`."""
        scales_RMP, acts_RE = self._rows_R.scales_RMP, self._rows_R.acts_RE.numpy()
        if scales_RMP is None:
            np.take(acts_RE, picks_B, axis=0, out=out_BMPD.flatten(1).view(torch.uint8).numpy(), mode="clip")
            return
        scales_BMP = scales_RMP[torch.from_numpy(picks_B)]
        for first in range(0, len(picks_B), _ROWS_AT_ONCE):
            part = slice(first, first + _ROWS_AT_ONCE)
            acts_BE = torch.from_numpy(acts_RE.take(picks_B[part], axis=0, mode="clip"))
            unpack(PackedRows(acts_BE, scales_BMP[part]), self.store.layout, out_BMPD[part])
