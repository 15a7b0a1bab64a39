"""Shuffled, scaled batches of activations.

R rows that arrive together · B batch · M models · P hookpoints · D model dimension.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from typing import Any

import torch

from crosscode.data.harvest.harvester import ActivationHarvester
from crosscode.data.prefetch import PrefetchedRows
from crosscode.data.rows import HarvestedRows, RowSource
from crosscode.data.scaling import estimate_scaling
from crosscode.data.shuffle import DEFAULT_CAPACITY, ShuffleBuffer
from crosscode.data.text.tokens import TokenSequenceLoader
from crosscode.errors import InputError, check_at_least, check_settings, fitting
from crosscode.stopping import Stopped, interruptible

log = logging.getLogger("crosscode")


class ActivationsDataloader:
    """Batches `acts_BMPD` (float32, scaled), shuffled.

    `source`: a token loader, whose usable positions `harvester` harvests, or any other row source (a store, several stores,
    a harvest with a store behind it). `batch_size`: activations a batch. `shuffle_buffer_size`: activations to draw from; 0
    is no shuffling, None is 65,536, or 0 where the rows come shuffled; a data set that is smaller is held as a whole. `seed`
    decides the draws. `scaling_MP`: given factors, or None to take those that the source knows, or else to estimate `sqrt(D)
    / mean ||x||` on the first `n_tokens_for_norm_estimate` usable positions, read by an iterator of their own so that none
    is lost to training (`scaled`: of other vectors that follow from the activations, `(B, M, P, D)` as well; the source
    knows nothing of them); `relative_norm_MP`: factors on these; `scale=False` yields raw activations. `drop_last` drops a
    last batch that is smaller; it matters only where the data ends. `prefetch`: harvests that a thread may run ahead; it
    changes no batch. `device`: where batches are handed out (None: where the rows are; the buffer is there in any case).

    `iter()` starts from the beginning, or from the state that was loaded; `state_dict()` is the position of the
    latest iterator. Both are exact: the same batches follow as without the interruption.

    Raises:
        InputError: a number that is too small, or a buffer that is smaller than a batch.
    """

    def __init__(
        self,
        source: TokenSequenceLoader | RowSource,
        harvester: ActivationHarvester | None = None,
        *,
        batch_size: int,
        shuffle_buffer_size: int | None = None,
        seed: int = 0,
        scale: bool = True,
        relative_norm_MP: torch.Tensor | None = None,
        scaling_MP: torch.Tensor | None = None,
        scaled: Callable[[torch.Tensor], torch.Tensor] | None = None,
        n_tokens_for_norm_estimate: int = 32_768,
        drop_last: bool = False,
        prefetch: int = 0,
        device: str | torch.device | None = None,
    ) -> None:
        rows = _as_rows(source, harvester)
        if shuffle_buffer_size is None:
            shuffle_buffer_size = 0 if rows.shuffled else DEFAULT_CAPACITY
        check_at_least(1, batch_size=batch_size, n_tokens_for_norm_estimate=n_tokens_for_norm_estimate)
        check_at_least(0, prefetch=prefetch)
        if shuffle_buffer_size < 0 or 0 < shuffle_buffer_size < batch_size:
            raise InputError(f"shuffle_buffer_size: {shuffle_buffer_size} is below batch_size {batch_size}")
        self.rows = PrefetchedRows(rows, prefetch) if prefetch else rows
        self.batch_size = batch_size
        self.shuffle_buffer_size = shuffle_buffer_size
        self.seed = seed
        self.drop_last = drop_last
        self.dims = rows.dims
        self.device = rows.device if device is None else torch.device(device)
        self._scaling_MP = self._check_scaling(scaling_MP) if scale else torch.ones(self.dims[:2])
        self._scaled = scaled
        self._relative_norm_MP = relative_norm_MP
        self._n_tokens_for_norm_estimate = n_tokens_for_norm_estimate
        self._start: dict[str, Any] | None = None
        self._iterator: _BatchIterator | None = None

    @property
    def scaling_MP(self) -> torch.Tensor:
        """Factors that every batch is multiplied with (float32, on the CPU); estimated when first asked for."""
        if self._scaling_MP is None and self._scaled is None:
            self._scaling_MP = self._check_scaling(self.rows.scaling_MP())
        if self._scaling_MP is None:
            log.info("estimating the scale of activations on %d tokens", self._n_tokens_for_norm_estimate)
            with closing(self.rows.open_sample()) as sample:
                acts = (self._scaled(rows.acts_RMPD.float()) if self._scaled else rows.acts_RMPD for rows in sample)
                self._scaling_MP = estimate_scaling(acts, self._n_tokens_for_norm_estimate)
        if self._relative_norm_MP is not None:
            self._scaling_MP, self._relative_norm_MP = self._scaling_MP * self._relative_norm_MP, None
        return self._scaling_MP

    def __iter__(self) -> Iterator[torch.Tensor]:
        start, self._start = self._start, None
        self.close()
        with fitting("data state: the saved position") if start is not None else nullcontext():
            self._iterator = _BatchIterator(self, start)
        return self._iterator

    def close(self) -> None:
        """End the latest iterator's threads and files; iterating again opens new ones."""
        if self._iterator is not None:
            self._iterator.close()

    def state_dict(self) -> dict[str, Any]:
        """Position after the last batch that was handed out, the buffer's content included.

        Nested dictionaries of tensors, ints and strings.
        """
        if self._start is not None:
            return self._start
        if self._iterator is None:
            return {**self._settings(), "scaling_MP": self.scaling_MP, "started": 0}
        return self._iterator.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next `iter()` continues from `state`. Raises InputError if it belongs to other settings."""
        check_settings(self._settings(), state, may_lack=["tokens.tokenizer"])
        with fitting("data state: scaling_MP"):
            self._scaling_MP, self._relative_norm_MP = self._check_scaling(state["scaling_MP"]), None
        self._start = dict(state)
        self.close()
        self._iterator = None

    def _settings(self) -> dict[str, Any]:
        own = {"batch_size": self.batch_size, "shuffle_buffer_size": self.shuffle_buffer_size, "seed": self.seed}
        return {**own, **self.rows.settings()}

    def _check_scaling(self, scaling_MP: torch.Tensor | None) -> torch.Tensor | None:
        if scaling_MP is None:
            return None
        if tuple(scaling_MP.shape) != self.dims[:2]:
            raise InputError(f"scaling_MP: shape {tuple(scaling_MP.shape)} should be {self.dims[:2]}")
        return scaling_MP.detach().float().cpu()


def _as_rows(source: TokenSequenceLoader | RowSource, harvester: ActivationHarvester | None) -> RowSource:
    if not isinstance(source, TokenSequenceLoader):
        return source
    if harvester is None:
        raise InputError("harvester: a token loader needs one to turn tokens into activations")
    return HarvestedRows(source, harvester)


class _BatchIterator(Iterator[torch.Tensor]):
    """Position: the row stream's, the rows that have come but are not in the buffer, and the buffer's. Where a signal ends
    the wait for rows (`Stopped`), it is that of before: what was read of them is read again."""

    def __init__(self, loader: ActivationsDataloader, start: dict[str, Any] | None) -> None:
        self._loader = loader
        self._scaling_MP = loader.scaling_MP
        self._scale_MP1 = None
        if bool((self._scaling_MP != 1).any()):
            self._scale_MP1 = self._scaling_MP.to(loader.device)[..., None]
        state = start if start is not None and start["started"] else None
        self._stream = loader.rows.open(None if state is None else state["rows"])
        self._stopped_at: dict[str, Any] | None = None
        self._waiting_RMPD = self._no_rows() if state is None else state["waiting_RMPD"].to(loader.rows.device)
        self._ended = state is not None and bool(state["ended"])
        self._filled = state is not None and bool(state["filled"])
        self._buffer = ShuffleBuffer(
            loader.shuffle_buffer_size,
            loader.dims,
            generator=torch.Generator().manual_seed(loader.seed),
            dtype=loader.rows.dtype,
            device=loader.rows.device,
        )
        self._target = loader.shuffle_buffer_size if state is None else int(state["target"])
        if state is not None:
            self._buffer.load_state_dict(state["buffer"])

    def state_dict(self) -> dict[str, Any]:
        return {
            **self._loader._settings(),
            "started": 1,
            "rows": self._stopped_at or self._stream.state_dict(),
            "waiting_RMPD": self._waiting_RMPD.clone(),
            "buffer": self._buffer.state_dict(),
            "ended": int(self._ended),
            "filled": int(self._filled),
            "target": self._target,
            "scaling_MP": self._scaling_MP,
        }

    def __next__(self) -> torch.Tensor:
        size = self._loader.batch_size
        if self._loader.shuffle_buffer_size:
            self._fill()
            batch_BMPD = self._buffer.take(size)
        else:
            batch_BMPD = self._take_in_order(size)
        if batch_BMPD.shape[0] == 0 or (self._loader.drop_last and batch_BMPD.shape[0] < size):
            raise StopIteration
        batch_BMPD = batch_BMPD.to(self._loader.device).float()
        return batch_BMPD if self._scale_MP1 is None else batch_BMPD.mul_(self._scale_MP1)

    def close(self) -> None:
        self._stream.close()

    def _fill(self) -> None:
        """Fill the buffer up to its capacity, or to the size of a data set that is smaller than it."""
        while self._buffer.n_rows < self._target and not self._ended:
            if self._waiting_RMPD.shape[0] == 0:
                epoch = self._next_rows()
                if epoch > 0 and not self._filled:
                    self._filled = True
                    self._target = max(self._buffer.n_rows, self._loader.batch_size)
                continue
            n_wanted = self._target - self._buffer.n_rows
            n_put = self._buffer.put(self._waiting_RMPD[:n_wanted])
            self._waiting_RMPD = self._waiting_RMPD[n_put:]
        self._filled = True

    def _take_in_order(self, size: int) -> torch.Tensor:
        parts, n_rows = [], 0
        while n_rows < size and not self._ended:
            if self._waiting_RMPD.shape[0] == 0:
                try:
                    self._next_rows()
                except Stopped:
                    self._waiting_RMPD = torch.cat([self._waiting_RMPD, *parts])
                    raise
                continue
            parts.append(self._waiting_RMPD[: size - n_rows])
            n_rows += parts[-1].shape[0]
            self._waiting_RMPD = self._waiting_RMPD[parts[-1].shape[0] :]
        return parts[0] if len(parts) == 1 else torch.cat([self._no_rows(), *parts])

    def _next_rows(self) -> int:
        """Fetch the next rows into the waiting ones; their epoch, or -1 at the end of the data."""
        before = self._stream.state_dict()
        try:
            with interruptible():
                rows = next(self._stream, None)
        except Stopped:
            self._stopped_at = before
            raise
        if rows is None:
            self._ended = True
            return -1
        self._waiting_RMPD = rows.acts_RMPD
        return rows.epoch

    def _no_rows(self) -> torch.Tensor:
        loader = self._loader
        return torch.empty((0, *loader.dims), dtype=loader.rows.dtype, device=loader.rows.device)
