"""Arrays of the user's own whose rows can be read in any order.

N rows of an input · R rows that are read together · E what a row holds, in bytes · row shape: (D,), (P, D) or (M, P, D).
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from crosscode.data.store.reader import ActivationCache, read_runs
from crosscode.errors import InputError

ROWS_AT_ONCE = 2048
_NUMPY = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16}
DTYPES = (*_NUMPY.values(), torch.bfloat16)
_SAMPLED_ROWS = 64


class ArrayInput(Protocol):
    """One array, or one stream of batches."""

    origin: str
    """what it is, for people"""
    is_saved: bool
    """whether it can be opened again, by another process, from what the config says"""
    row_shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def n_rows(self) -> int | None:
        """None: not known before it ends."""
        ...

    def chunks(self, first: int = 0, end: int | None = None) -> Iterator[torch.Tensor]:
        """Rows from `first` on, in order, some at a time."""
        ...


class RandomAccess:
    """An array whose rows can be read in any order; a subclass says how."""

    origin: str
    is_saved = False
    n_rows: int
    row_shape: tuple[int, ...]
    dtype: torch.dtype

    def read_into(self, index_R: np.ndarray, out_RE: np.ndarray) -> None:
        """The bytes of the rows `index_R` (ascending)."""
        raise NotImplementedError

    def close(self) -> None:
        """Give back files; reading again opens them again."""

    @property
    def row_bytes(self) -> int:
        return math.prod(self.row_shape) * self.dtype.itemsize

    def read(self, index_R: np.ndarray) -> torch.Tensor:
        rows_RE = np.empty((len(index_R), self.row_bytes), dtype=np.uint8)
        self.read_into(index_R, rows_RE)
        return torch.from_numpy(rows_RE).view(self.dtype).view(len(index_R), *self.row_shape)

    def chunks(self, first: int = 0, end: int | None = None) -> Iterator[torch.Tensor]:
        end = self.n_rows if end is None else end
        for start in range(first, end, ROWS_AT_ONCE):
            yield self.read(np.arange(start, min(start + ROWS_AT_ONCE, end)))

    def content(self) -> str:
        """8 hex digits of the shape, the dtype and some rows."""
        index_R = np.unique(np.linspace(0, self.n_rows - 1, _SAMPLED_ROWS).astype(np.int64))
        digest = hashlib.sha256(f"{self.n_rows} {self.row_shape} {self.dtype}".encode())
        rows_RE = np.empty((len(index_R), self.row_bytes), dtype=np.uint8)
        self.read_into(index_R, rows_RE)
        digest.update(rows_RE.tobytes())
        return digest.hexdigest()[:8]


class TensorInput(RandomAccess):
    """A tensor in memory, on any device."""

    def __init__(self, tensor: torch.Tensor):
        if tensor.dtype not in DTYPES:
            names = ", ".join(str(one).removeprefix("torch.") for one in DTYPES)
            raise InputError(f"acts: a tensor of {tensor.dtype}: activations must be one of {names}")
        if tensor.layout != torch.strided or tensor.is_meta:
            what = "has no values" if tensor.is_meta else f"lies in {tensor.layout}; give it as `.to_dense()`"
            raise InputError(f"acts: a tensor of shape {tuple(tensor.shape)} {what}")
        self.origin, self.tensor = f"a tensor in memory {tuple(tensor.shape)}", tensor.detach()
        check_has_rows(self.origin, tensor.shape)
        self.n_rows, self.row_shape, self.dtype = tensor.shape[0], tuple(tensor.shape[1:]), tensor.dtype

    def read_into(self, index_R: np.ndarray, out_RE: np.ndarray) -> None:
        rows = self.tensor[torch.from_numpy(index_R).to(self.tensor.device)].cpu().contiguous()
        out_RE[:] = rows.flatten(1).view(torch.uint8).numpy()


class NumpyInput(RandomAccess):
    """A numpy array, or a memory map, of which no more stays in memory than is read at once."""

    def __init__(self, array: np.ndarray):
        self.dtype = numpy_dtype(array.dtype, "acts")
        what = "a memory map" if isinstance(array, np.memmap) else "an array in memory"
        self.origin, self.array = f"{what} {array.shape}", array
        check_has_rows(self.origin, array.shape)
        self.n_rows, self.row_shape = array.shape[0], array.shape[1:]
        # Pages of a private map may hold what is nowhere else.
        self._map = getattr(array, "_mmap", None) if getattr(array, "mode", "c") != "c" else None

    def read_into(self, index_R: np.ndarray, out_RE: np.ndarray) -> None:
        rows = np.ascontiguousarray(self.array[index_R])
        out_RE[:] = rows.view(np.uint8).reshape(len(index_R), -1)
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


def check_has_rows(origin: str, shape: Sequence[int]) -> None:
    """Raise `InputError` where rows are no activations of M models at P hookpoints."""
    if not 2 <= len(shape) <= 4:
        raise InputError(
            f"acts: {origin}: shape {tuple(shape)}: rows of activations are wanted: (N, D), (N, P, D) or (N, M, P, D)"
        )


class FileInput(RandomAccess):
    """Rows that lie one behind the other in a file, which is read by position and never mapped."""

    is_saved = True

    def __init__(self, path: Path, offset: int, dtype: torch.dtype, shape: tuple[int, ...], key: str | None = None):
        self.path, self.offset, self.dtype, self.key = path, offset, dtype, key
        self.origin = str(path)
        check_has_rows(self.origin, shape)
        self.n_rows, self.row_shape = shape[0], tuple(shape[1:])
        self._file: int | None = None
        wanted = offset + self.n_rows * self.row_bytes
        if path.stat().st_size < wanted:
            raise InputError(
                f"{str(path)!r}: holds {path.stat().st_size} bytes, but {shape} takes {wanted}; it is damaged"
            )

    def read_into(self, index_R: np.ndarray, out_RE: np.ndarray) -> None:
        if self._file is None:
            self._file = os.open(self.path, os.O_RDONLY)
        begins_R = np.ones(len(index_R), dtype=bool)
        begins_R[1:] = index_R[1:] != index_R[:-1] + 1
        first_N = np.flatnonzero(begins_R)
        at_N = self.offset + self.row_bytes * index_R[first_N]
        whole_RE = out_RE if out_RE.flags.c_contiguous else np.empty(out_RE.shape, dtype=np.uint8)
        if not all(read_runs([self._file] * len(first_N), at_N, first_N, whole_RE)):
            raise InputError(f"{str(self.path)!r}: became shorter while it was read")
        if whole_RE is not out_RE:
            out_RE[:] = whole_RE

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


class StoreInput(RandomAccess):
    """A store of activations."""

    is_saved = True

    def __init__(self, store: ActivationCache):
        store.check_not_empty()
        self.origin, self.store = str(store), store
        self.n_rows, self.row_shape, self.dtype = store.n_rows, store.dims, store.dtype
        self.close = store.close

    def read_into(self, index_R: np.ndarray, out_RE: np.ndarray) -> None:
        rows = self.store.read_rows(torch.from_numpy(index_R))
        out_RE[:] = rows.flatten(1).view(torch.uint8).numpy()


def numpy_dtype(dtype: np.dtype, where: str) -> torch.dtype:
    if dtype.name not in _NUMPY or not dtype.isnative:
        swapped = "" if dtype.isnative else ", in this machine's byte order"
        raise InputError(f"{where}: {dtype!r}: activations must be one of {', '.join(_NUMPY)}{swapped}")
    return _NUMPY[dtype.name]
