"""Harvest with a store behind it: once ahead of training, or while training reads.

R rows that arrive together · M models · P hookpoints · D model dimension.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch

from crosscode.data.harvest.harvester import ActivationHarvester
from crosscode.data.permutation import permuted
from crosscode.data.rows import HarvestedRows, Rows, RowStream
from crosscode.data.store.format import StoreError, StoreNotWritten
from crosscode.data.store.manifest import layout_of, make_manifest
from crosscode.data.store.place import Place, place
from crosscode.data.store.reader import ActivationCache
from crosscode.data.store.writer import ActivationCacheWriter
from crosscode.data.text.tokens import TokenSequenceLoader
from crosscode.errors import check_at_least
from crosscode.seeds import derived_seed
from crosscode.stopping import interruptible, uninterrupted

log = logging.getLogger("crosscode")

_ROWS_PER_READ = 2048
Progress = Callable[[int, int], None]


def harvest_to_store(
    token_loader: TokenSequenceLoader,
    harvester: ActivationHarvester,
    path: str | Place,
    *,
    max_rows: int | None = None,
    on_progress: Progress | None = None,
    **store: Any,
) -> ActivationCache:
    """Harvest one epoch of `token_loader` into a store and open it.

    `store`: `dtype`, `shard_bytes` and `max_bytes`, as `HarvestThroughStore` takes them. A store that is there
    already is checked row by row, then continued after its last whole shard, or left as it is if it is complete.
    Stops at the end of the data, below `max_bytes`, or at the first harvest that reaches `max_rows`.
    `on_progress(n_rows, n_bytes)` is called after each harvest. Raises InputError for bad arguments, StoreError
    as `ActivationCacheWriter` does, and `Stopped` with all stored that was harvested.
    """
    check_at_least(1, max_rows=max_rows)
    through = HarvestThroughStore(token_loader, harvester, path, **store)
    with through.open_writer() as writer:
        n_rows, n_bytes = writer.n_rows, writer.n_bytes
        if n_rows:
            log.info("store %s: checking the %d activations that it holds", path, n_rows)
            with interruptible():
                ActivationCache(path, unfinished=True).verify()
        stream = through.harvested.open(writer.resume_state)
        while not writer.finished and not writer.full and (max_rows is None or n_rows < max_rows):
            with interruptible():
                item = next(stream, None)
            if item is None:
                writer.finish()
                break
            writer.append(item.acts_RMPD, stream.state_dict(), item.tokens_R, item.labels)
            if not writer.full:
                n_rows += item.acts_RMPD.shape[0]
                n_bytes += item.acts_RMPD.shape[0] * writer.layout.row_bytes
            if on_progress is not None:
                on_progress(n_rows, n_bytes)
    return ActivationCache(path)


class HarvestThroughStore:
    """Harvest that keeps what it makes: the first epoch fills the store, later ones read it back.

    A row source for the dataloader. Rows that the store holds already (of an earlier run, or of one that was killed)
    are read, not harvested again; those that it is missing are harvested and appended. Rows come back as the store
    holds them from the first time on, so that every epoch sees the same values. With `max_bytes`, what does not fit is
    harvested again each epoch; so is, with a warning, what the disk refuses to take. `epochs` as of the token loader;
    the order of documents is that of its first epoch.
    """

    shuffled = False

    def __init__(
        self,
        token_loader: TokenSequenceLoader,
        harvester: ActivationHarvester,
        path: str | Place,
        *,
        dtype: str = "float32",
        shard_bytes: int = 256 << 20,
        max_bytes: int | None = None,
    ) -> None:
        self.epochs = token_loader.policy.epochs
        self.seed = token_loader.policy.seed
        self.path = place(path)
        self.harvested = HarvestedRows(token_loader.fresh(epochs=1), harvester)
        self.manifest = make_manifest(self.harvested.token_loader, harvester, dtype=dtype)
        self.dtype_on_disk = dtype
        self.dims, self.dtype = harvester.dims, layout_of(self.manifest).read_dtype
        self.device = torch.device("cpu")
        self._sizes: dict[str, Any] = {"shard_bytes": shard_bytes, "max_bytes": max_bytes}

    def open(self, state: dict[str, Any] | None = None) -> RowStream:
        return _ThroughStream(self, state, self.epochs)

    def open_sample(self) -> RowStream:
        """It fills the store as any other pass does: what an estimate has seen is not harvested again."""
        return _ThroughStream(self, None, 1)

    def open_writer(self, **of_ranks: Any) -> ActivationCacheWriter:
        return ActivationCacheWriter(self.path, self.manifest, **self._sizes, **of_ranks)

    def settings(self) -> dict[str, Any]:
        return {**self.harvested.settings(), "store.dtype": self.dtype_on_disk}

    def scaling_MP(self) -> torch.Tensor | None:
        return None


class _ThroughStream:
    """Position: epoch, rows handed out of it, and whether it is one that reads a whole store in random order.

    Where the rows of an epoch in stored order come from is the store's own affair.
    """

    def __init__(self, source: HarvestThroughStore, state: dict[str, Any] | None, epochs: int | None) -> None:
        self._source = source
        self._epochs = epochs
        self._epoch = int(state["epoch"]) if state else 0
        self._row = int(state["row"]) if state else 0
        self._shuffled = bool(state["shuffled"]) if state else False
        self._writer = source.open_writer()
        if self._shuffled and not self._writer.finished:
            n_rows = self._writer.n_rows
            self._writer.close()
            raise StoreError(
                f"store {str(source.path)!r} was complete when the position was saved and holds {n_rows} rows now; "
                "complete it with `crosscode harvest`"
            )
        self._cache: ActivationCache | None = None
        self._live: RowStream | None = None
        self._live_row = 0

    def __iter__(self) -> Iterator[Rows]:
        return self

    def __next__(self) -> Rows:
        while self._epochs is None or self._epoch < self._epochs:
            acts_RMPD = self._read() if self._row < self._writer.n_rows and self._live is None else self._harvest()
            if acts_RMPD is not None:
                self._row += acts_RMPD.shape[0]
                return Rows(acts_RMPD, self._epoch)
            self._epoch, self._row, self._live = self._epoch + 1, 0, None
            self._shuffled = self._writer.finished
        raise StopIteration

    def _read(self) -> torch.Tensor:
        """Stored rows, in stored order in the first epoch and in any that began before the store was whole."""
        if self._cache is None:
            self._cache = ActivationCache(self._source.path, unfinished=True)
        elif self._cache.n_rows != self._writer.n_rows:
            self._cache.refresh()
        n_rows = self._cache.n_rows
        n = min(_ROWS_PER_READ, n_rows - self._row)
        place_B = torch.arange(self._row, self._row + n)
        if self._shuffled:
            seed = derived_seed(self._source.seed, self._epoch)
            return self._cache.read_rows(permuted(place_B, n_rows, seed))
        return self._cache.read_rows(place_B)

    def _harvest(self) -> torch.Tensor | None:
        """Harvested rows from the first on that was not handed out; None at the end of the epoch."""
        if self._writer.finished:
            return None
        if self._live is None:
            self._live = self._source.harvested.open(self._writer.resume_state)
            self._live_row = self._writer.n_rows
        for item in self._live:
            stored_RMPD = self._append(item, self._live.state_dict())
            first, self._live_row = self._live_row, self._live_row + stored_RMPD.shape[0]
            if self._live_row > self._row:
                return stored_RMPD[max(0, self._row - first) :].clone()
        self._warn_only(self._writer.finish)
        return None

    def _append(self, rows: Rows, state: dict[str, Any]) -> torch.Tensor:
        stored_RMPD = self._warn_only(self._writer.append, rows.acts_RMPD, state, rows.tokens_R, rows.labels)
        # A writer that has failed keeps nothing more, and still gives back what it would have stored.
        return self._writer.append(rows.acts_RMPD, state) if stored_RMPD is None else stored_RMPD

    def _warn_only(self, action: Callable[..., Any], *args: Any) -> Any:
        """Training goes on where the disk refuses: the store saves time and decides nothing."""
        try:
            with uninterrupted():
                return action(*args)
        except StoreNotWritten as error:
            log.warning("%s; training goes on, and what is not stored is harvested again each epoch", error)
            return None

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "row": self._row, "shuffled": int(self._shuffled)}

    def close(self) -> None:
        if self._live is not None:
            self._live.close()
        self._warn_only(self._writer.close)
