"""Inputs of the user's own, one for all positions or one for each, as rows to train on and rows that are held out.

N rows · R rows that are read together · E what a row holds, in bytes · M models · P hookpoints · D model dimension.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad

from crosscode.data.arrays.in_order import BatchesInput
from crosscode.data.arrays.random_access import ROWS_AT_ONCE, ArrayInput, RandomAccess, check_has_rows
from crosscode.data.rows import Rows, RowSource, RowStream
from crosscode.data.shuffle import DEFAULT_CAPACITY
from crosscode.data.store.format import PackedRows
from crosscode.data.store.rows import ReadBlock, StoredRows
from crosscode.errors import InputError
from crosscode.widths import Widths


@dataclass(frozen=True)
class ArrayLayout:
    """One row: `dims` = (M, P, D) of a torch dtype, with nothing beside it (see `Layout`)."""

    dims: tuple[int, int, int]
    read_dtype: torch.dtype
    n_scales = 0

    @property
    def acts_bytes(self) -> int:
        return math.prod(self.dims) * self.read_dtype.itemsize

    @property
    def row_bytes(self) -> int:
        return self.acts_bytes


class ArrayStore:
    """The first `n_rows` rows of arrays that can be read in any order, side by side along the positions (`RowStore`), vectors
    padded with zeros to the widest."""

    is_remote = False

    def __init__(self, inputs: Sequence[RandomAccess], dims: tuple[int, int, int], n_rows: int):
        self.inputs, self.dims, self.n_rows, self.dtype = list(inputs), dims, n_rows, inputs[0].dtype
        self.layout: Any = ArrayLayout(dims, self.dtype)

    def __str__(self) -> str:
        return ", ".join(one.origin for one in self.inputs)

    def content(self) -> str:
        return f"{self.n_rows}:" + ",".join(one.content() for one in self.inputs)

    def check_not_empty(self) -> None:
        if self.n_rows < 1:
            raise InputError(f"acts: {self} holds no row to train on")

    def mean_norm_MP(self) -> None:
        """Not known without reading rows."""
        return None

    def read_ascending(self, index_R: np.ndarray, out: PackedRows | None = None) -> PackedRows:
        out = PackedRows.empty(len(index_R), self.layout) if out is None else out
        rows_RE, at, width = out.acts_RE.numpy(), 0, self.dims[2]
        for one in self.inputs:
            rows_RE[:, at + one.row_bytes : at + one.row_bytes * width // one.row_shape[-1]] = 0
            one.read_into(index_R, rows_RE[:, at : at + one.row_bytes])
            at += one.row_bytes * width // one.row_shape[-1]
        return out

    def read_rows(self, index_B: torch.Tensor) -> torch.Tensor:
        ascending_B, order_B = index_B.sort()
        packed = self.read_ascending(ascending_B.numpy())
        acts_BMPD = packed.acts_RE.view(self.dtype).view(-1, *self.dims)
        return torch.empty_like(acts_BMPD).index_copy_(0, order_B, acts_BMPD)

    def close(self) -> None:
        for one in self.inputs:
            one.close()


class InOrderRows:
    """Rows in the order in which inputs give them, from `first` to `end`, over and over (an iterator: once)."""

    shuffled = False

    def __init__(self, arrays: Arrays, first: int, end: int | None, epochs: int | None) -> None:
        self._arrays, self._first, self._end = arrays, first, end
        self._epochs = 1 if arrays.is_once else epochs
        self.dims, self.dtype, self.device = arrays.dims, arrays.inputs[0].dtype, torch.device("cpu")

    def open(self, state: dict[str, Any] | None = None) -> RowStream:
        if state is not None:
            self._arrays.check_resumable()
        return _InOrderStream(self._passes, state, self._epochs)

    def open_sample(self) -> RowStream:
        if self._arrays.n_rows is not None:
            return _InOrderStream(self._passes, None, 1)
        samples = [one.sample(self._first) for one in self._arrays.inputs if isinstance(one, BatchesInput)]
        return _InOrderStream(lambda _: self._arrays.joined(samples), None, 1)

    def settings(self) -> dict[str, Any]:
        return {"arrays": ",".join(getattr(one, "content", lambda: "batches")() for one in self._arrays.inputs)}

    def scaling_MP(self) -> torch.Tensor | None:
        return None

    def _passes(self, skip: int) -> Iterator[torch.Tensor]:
        return self._arrays.chunks(self._first + skip, self._end)


class _InOrderStream:
    def __init__(self, passes: Any, state: dict[str, Any] | None, epochs: int | None):
        self._passes, self._epochs = passes, epochs
        self._epoch, self._row = (0, 0) if state is None else (int(state["epoch"]), int(state["row"]))
        self._chunks = passes(self._row)

    def __iter__(self) -> Iterator[Rows]:
        return self

    def __next__(self) -> Rows:
        acts_RMPD = next(self._chunks, None)
        if acts_RMPD is None:
            if self._row == 0 or (self._epochs is not None and self._epoch + 1 >= self._epochs):
                raise StopIteration
            self._epoch, self._row = self._epoch + 1, 0
            self._chunks = self._passes(0)
            return next(self)
        self._row += acts_RMPD.shape[0]
        return Rows(acts_RMPD, self._epoch)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "row": self._row}

    def close(self) -> None:
        self._chunks.close()


class Arrays:
    """One input with all positions, or one for each, checked against the positions `dims[:2]` = (M, P).

    Raises:
        InputError: numbers of rows, dtypes or shapes that do not fit together, or not (M, P).
    """

    def __init__(self, inputs: Sequence[ArrayInput], n_models: int, n_hookpoints: int):
        self.inputs, first = list(inputs), inputs[0]
        n_positions = n_models * n_hookpoints
        for one in self.inputs[1:]:
            for what, mine, theirs in (
                ("rows", one.n_rows, first.n_rows),
                ("dtype", one.dtype, first.dtype),
                ("positions in a row", one.row_shape[:-1], first.row_shape[:-1]),
            ):
                if mine != theirs:
                    raise InputError(
                        f"acts: {what}: {mine} of {one.origin}, but {theirs} of {first.origin}; inputs of several "
                        "positions go together row by row"
                    )
        check_has_rows(first.origin, (first.n_rows or 0, *first.row_shape))
        positions = first.row_shape[:-1]
        held = math.prod(positions) * len(self.inputs)
        if held != n_positions or (len(positions) == 2 and tuple(positions) != (n_models, n_hookpoints)):
            raise InputError(
                f"acts: rows of shape {first.row_shape} x {len(self.inputs)} input(s) hold {held} position(s), but there "
                f"are names for {n_models} model(s) x {n_hookpoints} hookpoint(s)"
            )
        widths_X = tuple(one.row_shape[-1] for one in self.inputs for _ in range(math.prod(positions)))
        self.widths_MP = Widths(widths_X[m * n_hookpoints : (m + 1) * n_hookpoints] for m in range(n_models))
        if positions and self.widths_MP.padded:
            raise InputError(f"acts: vectors of widths {list(widths_X)}: give one input for each position, (N, width)")
        self.dims = (n_models, n_hookpoints, self.widths_MP.widest)
        self.n_rows = first.n_rows
        if self.n_rows is not None and self.n_rows < 2:
            raise InputError(f"acts: {first.origin} holds {self.n_rows} row(s): at least 2 are needed, one is held out")

    @property
    def is_once(self) -> bool:
        return any(isinstance(one, BatchesInput) and one.is_once for one in self.inputs)

    @property
    def row_bytes(self) -> int:
        return math.prod(self.dims) * self.inputs[0].dtype.itemsize

    def check_resumable(self) -> None:
        """Raise `InputError` where nobody can tell which rows were used."""
        for one in self.inputs:
            if one.n_rows is None:
                raise InputError(
                    f"resume: the activations of this run were {one.origin}, which has no position to go on from; begin "
                    "a new run with finetune_from"
                )

    def rows(
        self, n_heldout: int, *, epochs: int | None, seed: int, window: int | None, read_block: ReadBlock
    ) -> RowSource:
        """Rows to train on: all but the last `n_heldout`; of inputs that end nobody knows where, all but the first."""
        readers = [one for one in self.inputs if isinstance(one, RandomAccess)]
        if self.n_rows is not None and len(readers) == len(self.inputs):
            store = ArrayStore(readers, self.dims, self.n_rows - n_heldout)
            window = window or DEFAULT_CAPACITY
            return StoredRows(store, epochs=epochs, seed=seed, window=window, read_block=read_block)
        if self.n_rows is not None:
            return InOrderRows(self, 0, self.n_rows - n_heldout, epochs)
        return InOrderRows(self, n_heldout, None, epochs)

    def heldout(self, n_heldout: int, n_wanted: int) -> Iterator[torch.Tensor]:
        """The first `n_wanted` of the rows that are held out. Of an iterator, before any of `rows` was read."""
        first = 0 if self.n_rows is None else self.n_rows - n_heldout
        return self.chunks(first, first + n_wanted)

    def chunks(self, first: int, end: int | None) -> Iterator[torch.Tensor]:
        return self.joined([one.chunks(first, end) for one in self.inputs])

    def joined(self, streams: Sequence[Iterator[torch.Tensor]]) -> Iterator[torch.Tensor]:
        """`acts_RMPD` of streams that hold a position each, or of one that holds them all; at most 2048 rows a time."""
        waiting: list[torch.Tensor | None] = [None] * len(streams)
        while True:
            for i, stream in enumerate(streams):
                if waiting[i] is None:
                    waiting[i] = next(stream, None)
            held = [one for one in waiting if one is not None]
            if len(held) < len(streams):
                if held:
                    raise InputError("acts: one input ended before the others; they go together row by row")
                return
            n = min(ROWS_AT_ONCE, *(len(one) for one in held))
            for one, rows in zip(self.inputs, held, strict=True):
                if tuple(rows.shape[1:]) != one.row_shape:
                    raise InputError(
                        f"acts: {one.origin}: a batch of shape {tuple(rows.shape)}; the first had rows {one.row_shape}"
                    )
            parts = [pad(rows[:n].reshape(n, -1, rows.shape[-1]), (0, self.dims[2] - rows.shape[-1])) for rows in held]
            waiting = [rows[n:] if len(rows) > n else None for rows in held]
            yield torch.cat(parts, dim=1).reshape(n, *self.dims).to(self.inputs[0].dtype)
