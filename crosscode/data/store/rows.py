"""Rows out of stores: shuffled, over several epochs, mixed, or read through while a harvest fills them.

B indices at once · R rows that arrive together · W stores that are mixed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch

from crosscode.data.rows import Rows, RowStream
from crosscode.data.shuffle import DEFAULT_CAPACITY
from crosscode.data.store.manifest import check_same_content
from crosscode.data.store.reader import ActivationCache
from crosscode.data.store.window import RowStore, StoreWindow
from crosscode.errors import InputError, check_at_least
from crosscode.seeds import derived_seed

_BYTES_PER_READ, _LONGEST_BLOCK = 32 << 10, 16
_BYTES_PER_REQUEST, _FEWEST_BLOCKS = 512 << 10, 256
"""Of a remote store: 64 requests at once that take 20 ms each are 1.6 GB/s; and a window holds blocks enough to shuffle."""
ReadBlock = int | Literal["auto"] | None


class StoredRows:
    """Rows of one or several stores in random order; a new order every epoch.

    `weights`: how often a row comes from each store (None: in proportion to their sizes). `epochs`: None reads for
    ever; with several stores an epoch is as many rows as all of them hold. `rows_per_read`: rows handed out together.
    `seed` decides the order; `shuffle=False` keeps the stored one.

    Rows are drawn from a `window` of rows in memory, which several stores share by their weights, and which is filled
    with random blocks of `read_block` consecutive rows (`store_window` says what that gives up). "auto": as many as
    32 KiB hold, at most 16; of remote stores as many as 512 KiB hold, at most a 256th of the window. None: as "auto" of
    local ones. Longer blocks suit a disk; 1 makes any order of all rows possible, at the price of a read a row. Memory
    grows with the window alone; a position holds no rows.

    Raises:
        InputError: no store, an empty one, stores that do not go together, or a number that is too small.
    """

    def __init__(
        self,
        stores: RowStore | Sequence[RowStore],
        *,
        weights: Sequence[float] | None = None,
        epochs: int | None = None,
        seed: int = 0,
        rows_per_read: int = 2048,
        read_block: ReadBlock = "auto",
        window: int = DEFAULT_CAPACITY,
        shuffle: bool = True,
    ) -> None:
        self.stores: list[RowStore] = list(stores) if isinstance(stores, Sequence) else [stores]
        if not self.stores:
            raise InputError("stores: at least one is needed")
        given_block = None if read_block == "auto" else read_block
        check_at_least(1, rows_per_read=rows_per_read, read_block=given_block, window=window, epochs=epochs)
        for store in self.stores:
            store.check_not_empty()
        _check_mixable(self.stores)
        dtypes = {store.dtype for store in self.stores}
        self.dims = self.stores[0].dims
        self.dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        self.device = torch.device("cpu")
        self.weighted = weights is not None
        self.weights_W = _check_weights(weights, self.stores)
        self.epochs = epochs
        self.seed = seed
        self.rows_per_read = rows_per_read
        are_remote = read_block == "auto" and any(store.is_remote for store in self.stores)
        self.read_block = given_block or _default_block(self.stores, window if are_remote else None)
        self.window = window
        self.shuffle = shuffle
        self.shuffled = shuffle

    @property
    def n_rows(self) -> int:
        """Rows of all stores."""
        return sum(store.n_rows for store in self.stores)

    def open(self, state: dict[str, Any] | None = None) -> RowStream:
        return _StoreStream(self, state, self.epochs)

    def open_sample(self) -> RowStream:
        """A stream over one epoch, apart from that of training."""
        return _StoreStream(self, None, 1)

    def settings(self) -> dict[str, Any]:
        """What decides the rows and their order, for a run that goes on."""
        return {
            "store.content": ",".join(store.content() for store in self.stores),
            "store.weights": ",".join(f"{float(weight):.9g}" for weight in self.weights_W)
            if self.weighted
            else "sizes",
            "store.seed": self.seed,
            "store.read_block": self.read_block,
            "store.window": self.window,
            "store.shuffle": int(self.shuffle),
        }

    def scaling_MP(self) -> torch.Tensor | None:
        """`sqrt(D) / mean ||x||`, the mean over the mixture, where all stores know theirs."""
        means = [mean_MP for store in self.stores if (mean_MP := store.mean_norm_MP()) is not None]
        if len(means) < len(self.stores):
            return None
        means_WMP = torch.stack(means)
        mean_MP = torch.einsum("w,wmp->mp", self.weights_W, means_WMP)
        return (self.dims[2] ** 0.5 / mean_MP).float()


class _StoreStream:
    """Position: rows taken from each store, and the random state that mixes them.

    A store may have grown since the position was saved: the rows that it held then are the ones that are read.
    """

    def __init__(self, source: StoredRows, state: dict[str, Any] | None, epochs: int | None) -> None:
        self._source = source
        self._generator = torch.Generator().manual_seed(source.seed)
        self._taken_W = torch.zeros(len(source.stores), dtype=torch.long)
        self._sizes = [store.n_rows for store in source.stores]
        self._weights_W = source.weights_W
        if state is not None:
            self._taken_W = state["taken_W"].clone()
            self._generator.set_state(state["generator"])
            self._sizes = _check_not_shrunk(source.stores, state["sizes_W"].tolist())
            self._weights_W = state["weights_W"].clone()
        self._n_rows = sum(self._sizes)
        self._windows = [
            StoreWindow(store, block=source.read_block, window=max(1, round(source.window * weight)))
            for store, weight in zip(source.stores, self._weights_W.tolist(), strict=True)
        ]
        self._epochs = epochs
        self._limit = None if epochs is None else epochs * self._n_rows

    def __iter__(self) -> Iterator[Rows]:
        return self

    def __next__(self) -> Rows:
        source, n_taken = self._source, int(self._taken_W.sum())
        n_rows = source.rows_per_read
        if self._limit is not None:
            n_rows = min(n_rows, self._limit - n_taken)
        if n_rows == 0:
            raise StopIteration
        epoch = n_taken // self._n_rows
        if len(source.stores) == 1:
            acts_RMPD = self._read(0, n_rows)
        else:
            chosen_B = torch.multinomial(self._weights_W, n_rows, replacement=True, generator=self._generator)
            acts_RMPD = torch.empty((n_rows, *source.dims), dtype=source.dtype)
            for w in chosen_B.unique().tolist():
                places_B = (chosen_B == w).nonzero()[:, 0]
                acts_RMPD.index_copy_(0, places_B, self._read(w, len(places_B)).to(source.dtype))
        return Rows(acts_RMPD, epoch)

    def _read(self, w: int, n_rows: int) -> torch.Tensor:
        store, size = self._source.stores[w], self._sizes[w]
        taken = int(self._taken_W[w])
        self._taken_W[w] += n_rows
        parts = []
        while n_rows:
            epoch, position = divmod(taken, size)
            n_part = min(n_rows, size - position)
            if self._source.shuffle:
                seed, after = (derived_seed(self._source.seed, w, each) for each in (epoch, epoch + 1))
                is_last = self._epochs is not None and len(self._windows) == 1 and epoch + 1 >= self._epochs
                then = None if is_last else after
                parts.append(self._windows[w].read(position, n_part, n_rows=size, seed=seed, then=then))
            else:
                parts.append(store.read_rows(torch.arange(position, position + n_part)))
            taken, n_rows = taken + n_part, n_rows - n_part
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def state_dict(self) -> dict[str, Any]:
        return {
            "taken_W": self._taken_W.clone(),
            "generator": self._generator.get_state(),
            "sizes_W": torch.tensor(self._sizes),
            "weights_W": self._weights_W.clone(),
        }

    def close(self) -> None:
        for window in self._windows:
            window.close()
        for store in self._source.stores:
            store.close()


def _default_block(stores: Sequence[RowStore], remote_window: int | None) -> int:
    """Rows that make a read, or a request, worth its overhead."""
    n_bytes, longest = _BYTES_PER_READ, _LONGEST_BLOCK
    if remote_window is not None:
        n_bytes, longest = _BYTES_PER_REQUEST, max(longest, remote_window // _FEWEST_BLOCKS)
    return min(longest, max(1, n_bytes // max(store.layout.row_bytes for store in stores)))


def _check_not_shrunk(stores: Sequence[RowStore], sizes: list[int]) -> list[int]:
    for store, size in zip(stores, sizes, strict=True):
        if store.n_rows < size:
            raise InputError(f"{store} holds {store.n_rows} rows; it held {size} when the position was saved")
    return sizes


def _check_mixable(stores: Sequence[RowStore]) -> None:
    """Stores may differ in their texts, not in what their rows are."""
    first, *others = stores
    for other in others:
        if not (isinstance(first, ActivationCache) and isinstance(other, ActivationCache)):
            raise InputError(f"stores: {first} and {other} cannot be mixed: only stores that crosscode wrote can")
        same_text = {**other.manifest, "tokens": first.manifest["tokens"]}
        check_same_content(other.path, same_text, first.manifest, to_append=False)


def _check_weights(weights: Sequence[float] | None, stores: Sequence[RowStore]) -> torch.Tensor:
    if weights is None:
        weights = [store.n_rows for store in stores]
    if len(weights) != len(stores) or min(weights) < 0 or sum(weights) <= 0:
        raise InputError(f"weights: {list(weights)} should be {len(stores)} numbers, none below 0, not all 0")
    weights_W = torch.tensor(list(weights), dtype=torch.float64)
    return weights_W / weights_W.sum()
