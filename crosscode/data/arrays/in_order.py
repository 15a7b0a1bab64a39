"""Activations of the user's own that come in an order of their own: columns of parquet files, batches of any kind.

N rows of an input · R rows that are read together · E what a row holds, in bytes · row shape: (D,), (P, D) or (M, P, D).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crosscode.data.arrays.random_access import DTYPES, ROWS_AT_ONCE, numpy_dtype
from crosscode.errors import InputError

_STREAMED: Any = {"buffer_size": 1 << 20, "pre_buffer": False}
"""How a parquet file is opened, so that a row group of any size is read by pages; else pyarrow reads its column whole."""

BATCHES = "batches of "


class ParquetInput:
    """A column of lists (of lists) of numbers: read in order, a few rows at a time."""

    is_saved = True

    def __init__(self, path: Path, key: str | None):
        import pyarrow.parquet as pq

        self.path, self.origin = path, str(path)
        with pq.ParquetFile(path, **_STREAMED) as file:
            names = [field.name for field in file.schema_arrow if _is_list(field.type)]
            self.key = chosen(names, key, str(path), "column of lists of numbers")
            self.n_rows = file.metadata.num_rows
        first = next(self.chunks(0, min(1, self.n_rows)), None)
        if first is None:
            raise InputError(f"{str(path)!r}: holds no row")
        self.row_shape, self.dtype = tuple(first.shape[1:]), first.dtype

    def chunks(self, first: int = 0, end: int | None = None) -> Iterator[torch.Tensor]:
        import pyarrow.parquet as pq

        end = self.n_rows if end is None else end
        at = 0
        with pq.ParquetFile(self.path, **_STREAMED) as file:
            for group in range(file.num_row_groups):
                after = at + file.metadata.row_group(group).num_rows
                if after > first and at < end:
                    place = at
                    for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=[self.key]):
                        rows = slice(max(0, first - place), max(0, min(len(batch), end - place)))
                        if rows.start < rows.stop:
                            yield self._tensor(batch.column(0))[rows]
                        place += len(batch)
                at = after

    def content(self) -> str:
        facts = f"{self.n_rows} {self.row_shape} {self.dtype} {self.path.stat().st_size}"
        return hashlib.sha256(facts.encode()).hexdigest()[:8]

    def _tensor(self, column: Any) -> torch.Tensor:
        import pyarrow.compute as pc

        shape, values, is_even = [len(column)], column, True
        while _is_list(values.type):
            counted = pc.list_value_length(values)  # pyright: ignore[reportAttributeAccessIssue]
            lengths = set(counted.unique().to_pylist())
            is_even = is_even and len(lengths) <= 1
            values = values.flatten()
            shape.append((lengths.pop() if lengths else 0) or 0)
        if not is_even or math.prod(shape) != len(values) or values.null_count:
            raise InputError(f"{str(self.path)!r}: rows of {self.key!r} differ in length, or have gaps")
        array = values.to_numpy(zero_copy_only=False)
        numpy_dtype(array.dtype, f"{str(self.path)!r}: {self.key}")
        return torch.from_numpy(array.copy()).reshape(shape)


class BatchesInput:
    """Batches from a DataLoader, an iterator or any other iterable, whose position nobody can name.

    An iterator is read once. Any other iterable may be read again, for further passes; one that gives another order then
    (a DataLoader that shuffles) may show in training what was held out.
    """

    is_saved = False
    n_rows = None

    def __init__(self, batches: Iterable[Any]):
        self.origin = f"{BATCHES}{type(batches).__name__}"
        self._batches, self._head = batches, list[torch.Tensor]()
        self.is_once = isinstance(batches, Iterator)
        self._iterator = iter(batches) if self.is_once else None
        first = next(self._open(), None)
        if first is None:
            raise InputError(f"acts: {self.origin}: the first batch is missing: there is none")
        if self.is_once:
            self._head = [first]
        self.row_shape, self.dtype = tuple(first.shape[1:]), first.dtype

    def chunks(self, first: int = 0, end: int | None = None) -> Iterator[torch.Tensor]:
        """Of an iterator: what is left of it; `first` is where it stands."""
        wanted = None if end is None else end - first
        skip = 0 if self.is_once else first
        source = self._open()
        while wanted is None or wanted > 0:
            batch = self._head.pop(0) if self._head else next(source, None)
            if batch is None:
                return
            if skip:
                skip, batch = max(0, skip - len(batch)), batch[skip:]
            if wanted is not None and len(batch) > wanted:
                batch, rest = batch[:wanted], batch[wanted:]
                if self.is_once:
                    self._head.insert(0, rest)
            wanted = None if wanted is None else wanted - len(batch)
            if len(batch):
                yield batch

    def sample(self, first: int) -> Iterator[torch.Tensor]:
        """Rows as `chunks` gives them, which will give them again."""
        if not self.is_once:
            yield from self.chunks(first)
            return
        for i in range(len(self._head)):
            yield self._head[i]
        for batch in self._open():
            self._head.append(batch)
            yield batch

    def _open(self) -> Iterator[torch.Tensor]:
        batches = self._iterator if self._iterator is not None else iter(self._batches)
        return (_one_tensor(batch, self.origin) for batch in batches)


def chosen(names: list[str], key: str | None, where: str, what: str) -> str:
    if key is None and len(names) == 1:
        return names[0]
    if key not in names:
        asked = "key" if key is None else f"key = {key!r}"
        raise InputError(f"{where!r}: {asked}: name one {what}, of: {', '.join(names) or 'none'}")
    return key


def _is_list(kind: Any) -> bool:
    import pyarrow.types as types

    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _one_tensor(batch: Any, origin: str) -> torch.Tensor:
    """A batch as a tensor on the CPU; a DataLoader over a TensorDataset gives each in a list."""
    if isinstance(batch, (list, tuple)) and len(batch) == 1:
        batch = batch[0]
    if isinstance(batch, np.ndarray):
        numpy_dtype(batch.dtype, "acts")
        batch = torch.from_numpy(np.ascontiguousarray(batch))
    if not isinstance(batch, torch.Tensor) or batch.dtype not in DTYPES or batch.ndim < 2:
        what = f"{tuple(batch.shape)} of {batch.dtype}" if isinstance(batch, torch.Tensor) else type(batch).__name__
        raise InputError(
            f"acts: {origin}: one is {what}: must be a tensor or array of floating-point numbers, (B, D) or with more axes"
        )
    return batch.detach().cpu()
