"""A shuffle buffer of rows in one preallocated tensor.

N rows of the buffer · R rows that arrive · B rows of a batch · E what a row holds (any number of axes).
"""

from __future__ import annotations

import contextlib
import math
import mmap
from typing import Any

import numpy as np
import torch
from crosscode_kernels import host_buffers

DEFAULT_CAPACITY = 65_536
_HUGE_FROM_BYTES = 64 << 20


class ShuffleBuffer:
    """Holds up to `capacity` rows; `take` draws a batch without replacement and its places are filled again.

    Work per batch grows with the batch alone, not with the capacity. The drawn rows and their order depend on
    `generator` and on the rows put in, on nothing else.
    """

    def __init__(
        self,
        capacity: int,
        row_shape: tuple[int, ...],
        *,
        generator: torch.Generator,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self._rows_NE = _new_rows((capacity, *row_shape), dtype, torch.device(device))
        self._index_at_N = np.zeros(capacity, dtype=np.int64)
        self._generator = generator
        self._extent = 0
        self._holes_B = torch.empty(0, dtype=torch.long, device=device)

    @property
    def capacity(self) -> int:
        return self._rows_NE.shape[0]

    @property
    def n_rows(self) -> int:
        return self._extent - self._holes_B.numel()

    def put(self, rows_RE: torch.Tensor) -> int:
        """Copy in as many of the rows as fit; the number that did. Places that a batch has left come first."""
        n_holes = min(rows_RE.shape[0], self._holes_B.numel())
        if n_holes:
            _put_rows(self._rows_NE, self._holes_B[:n_holes], rows_RE[:n_holes])
            self._holes_B = self._holes_B[n_holes:]
        n_new = min(rows_RE.shape[0] - n_holes, self.capacity - self._extent)
        self._rows_NE[self._extent : self._extent + n_new].copy_(rows_RE[n_holes : n_holes + n_new])
        self._extent += n_new
        return n_holes + n_new

    def take(self, n: int) -> torch.Tensor:
        """`n` random rows, removed from the buffer (all that are left where there are fewer)."""
        self._close_holes()
        chosen_B = self._draw_places(min(n, self.n_rows)).to(self._rows_NE.device)
        batch_BE = _take_rows(self._rows_NE, chosen_B)
        self._holes_B = chosen_B
        return batch_BE

    def _close_holes(self) -> None:
        """Move rows from the end into the places that were not filled again, so that the rest is contiguous."""
        if self._holes_B.numel() == 0:
            return
        n_rows = self.n_rows
        last_B = torch.arange(n_rows, self._extent, device=self._holes_B.device)
        moved_R = last_B[~torch.isin(last_B, self._holes_B)]
        holes_R = self._holes_B[self._holes_B < n_rows]
        _put_rows(self._rows_NE, holes_R, _take_rows(self._rows_NE, moved_R))
        self._extent, self._holes_B = n_rows, self._holes_B[:0]

    def _draw_places(self, n: int) -> torch.Tensor:
        """`n` different places out of `n_rows`, in random order, in expected time O(n)."""
        if 2 * n >= self.n_rows:
            return torch.randperm(self.n_rows, generator=self._generator)[:n]
        places_B = np.empty(0, dtype=np.int64)
        while len(places_B) < n:
            n_more = n - len(places_B) + 16
            drawn_B = torch.randint(self.n_rows, (n_more + n_more * n // self.n_rows,), generator=self._generator)
            places_B = self._without_repeats(np.concatenate([places_B, drawn_B.numpy()]))
        return torch.from_numpy(places_B[:n])

    def _without_repeats(self, places_B: np.ndarray) -> np.ndarray:
        """Every different place once: each leaves its index at its place, and the last to come stays there."""
        index_B = np.arange(len(places_B))
        self._index_at_N[places_B] = index_B
        return places_B[self._index_at_N[places_B] == index_B]

    def state_dict(self) -> dict[str, Any]:
        return {
            "rows_NE": self._rows_NE[: self._extent].clone(),
            "holes_B": self._holes_B.clone(),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._extent = state["rows_NE"].shape[0]
        self._rows_NE[: self._extent].copy_(state["rows_NE"])
        self._holes_B = state["holes_B"].to(self._rows_NE.device)
        self._generator.set_state(state["generator"])


def _new_rows(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """On Linux's CPUs in huge pages, where the system grants them: rows are drawn from all over a large buffer, and with
    small pages finding each costs as much as copying it."""
    n_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or n_bytes < _HUGE_FROM_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def _take_rows(rows_NE: torch.Tensor, places_B: torch.Tensor) -> torch.Tensor:
    """Rows at `places_B`. On the CPU by numpy: one thread fills the memory bus, and unlike a team of OpenMP threads it
    does not wait for a core that another process has taken."""
    if rows_NE.device.type != "cpu":
        return rows_NE.index_select(0, places_B)
    batch_BE = host_buffers.empty((places_B.numel(), *rows_NE.shape[1:]), rows_NE)
    np.take(_row_bytes(rows_NE), places_B.numpy(), axis=0, out=_row_bytes(batch_BE), mode="clip")
    return batch_BE


def _put_rows(rows_NE: torch.Tensor, places_B: torch.Tensor, new_BE: torch.Tensor) -> None:
    if rows_NE.device.type != "cpu":
        rows_NE.index_copy_(0, places_B, new_BE)
    else:
        _row_bytes(rows_NE)[places_B.numpy()] = _row_bytes(new_BE.contiguous())


def _row_bytes(rows_NE: torch.Tensor) -> np.ndarray:
    """The same memory as bytes, one line a row: numpy has no bfloat16."""
    return rows_NE.detach().flatten(1).view(torch.uint8).numpy()
