"""The activation store, to read.

B rows asked for at once · R rows · M models · P hookpoints · D model dimension.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crosscode.data.store_format import (
    Layout,
    PackedRows,
    StoreError,
    read_shard_header,
    row_sums,
    shard_name,
    unpack,
)
from crosscode.data.store_manifest import Manifest, check_same_content, layout_of, read_manifest

_MAX_OPEN_SHARDS = 128
_ROWS_PER_CHECK = 8192
_ROWS_AT_ONCE = 256
_CALLS_PER_TRIAL = 64


@dataclass(frozen=True)
class Shard:
    """A whole shard: its rows, where its data begins, and the sums of norms `norm_sum_MP` of its activations."""

    path: Path
    n_rows: int
    offset: int
    norm_sum_MP: torch.Tensor


def list_shards(folder: Path, layout: Layout) -> list[Shard]:
    """Every whole shard, in order. Raises StoreError for a missing, truncated or foreign one."""
    names = sorted(path.name for path in folder.glob("shard-*.safetensors"))
    shards = []
    for index, name in enumerate(names):
        path = folder / shard_name(index)
        if name != path.name:
            raise StoreError(f"store: shard {str(path)!r} is missing, though {name} is there")
        n_rows, offset, info = read_shard_header(path, index, layout)
        shards.append(Shard(path, n_rows, offset, torch.tensor(info["norm_sums"], dtype=torch.float64)))
    return shards


class ActivationCache:
    """A store of activations on disk, opened to read; `ActivationCacheWriter` makes one.

    `expected`: the manifest of the run that wants to read it (`make_manifest`); a store with other content is refused
    by the field that differs. Rows are read at random, checked against their checksums each time, and handed out as
    float32 (bfloat16 for a bfloat16 store). Shards are mapped into memory, and their pages are let go whenever about
    `resident_bytes` of them count as this process's memory, so that this does not depend on the store's size. A larger
    store is read through the mapping or by position, whichever is faster: that depends on how its pages lie in memory.

    Reading needs neither the models nor the writer's lock: a store may grow while it is read, and `refresh` takes
    notice. Several threads may read from one object; they take turns.
    """

    def __init__(self, path: str | Path, *, expected: Manifest | None = None, resident_bytes: int = 512 << 20) -> None:
        self.path = Path(path)
        manifest = read_manifest(self.path)
        if manifest is None:
            raise StoreError(f"store {str(path)!r}: no such store (there is no manifest.json in that folder)")
        if expected is not None:
            check_same_content(self.path, manifest, expected, to_append=False)
        self.manifest = manifest
        self.layout = layout_of(manifest)
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._lock = threading.Lock()
        self._mapped_before = _mapped_bytes()
        self._resident_bytes = resident_bytes
        self._pace = _Pace()
        self._scratch_RE = np.empty((_ROWS_AT_ONCE, self.layout.acts_bytes), dtype=np.uint8)
        self.refresh()

    def refresh(self) -> None:
        """Take notice of shards that were written since."""
        self.shards = list_shards(self.path, self.layout)
        self._ends = np.cumsum([shard.n_rows for shard in self.shards], dtype=np.int64)
        self.n_bytes = sum(shard.offset + shard.n_rows * self.layout.row_bytes for shard in self.shards)

    @property
    def dims(self) -> tuple[int, int, int]:
        """(M, P, D)."""
        return self.layout.dims

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.layout.dtype == "bfloat16" else torch.float32

    @property
    def n_rows(self) -> int:
        return int(self._ends[-1]) if self.shards else 0

    def __len__(self) -> int:
        return self.n_rows

    def mean_norm_MP(self) -> torch.Tensor:
        """Mean norm of the activations (float64), over every row, as recorded while they were written."""
        if not self.shards:
            raise StoreError(f"store {str(self.path)!r} holds no whole shard yet")
        return torch.stack([shard.norm_sum_MP for shard in self.shards]).sum(dim=0) / self.n_rows

    def scaling_MP(self) -> torch.Tensor:
        """`sqrt(D) / mean ||x||` over the whole store (float32)."""
        return (self.dims[2] ** 0.5 / self.mean_norm_MP()).float()

    def read_rows(self, index_B: torch.Tensor) -> torch.Tensor:
        """`acts_BMPD` of the rows `index_B` (int64). Raises StoreError if a row does not match its checksum."""
        index = index_B.numpy()
        if index.size and (index.min() < 0 or index.max() >= self.n_rows):
            raise StoreError(f"store {str(self.path)!r}: row {int(index.max())} asked for, but it has {self.n_rows}")
        out_BMPD = torch.empty((len(index), *self.dims), dtype=self.dtype)
        out_BE = out_BMPD.flatten(1).view(torch.uint8).numpy()
        shard_B = np.searchsorted(self._ends, index, side="right")
        mapped = self.n_bytes <= self._resident_bytes or self._pace.choose()
        began = time.perf_counter()
        with self._lock:
            for shard in np.unique(shard_B).tolist():
                places = np.flatnonzero(shard_B == shard)
                local = index[places] - (self._ends[shard] - self.shards[shard].n_rows)
                for first in range(0, len(places), _ROWS_AT_ONCE):
                    part = slice(first, first + _ROWS_AT_ONCE)
                    rows = self._gather(shard, local[part], mapped)
                    acts_RE = rows.acts_RE if rows.scales_RMP is None else unpack(rows, self.layout).flatten(1)
                    out_BE[places[part]] = acts_RE.view(torch.uint8).numpy()
                    self._limit_resident()
        self._pace.note(mapped, time.perf_counter() - began, len(index))
        return out_BMPD

    def verify(self) -> None:
        """Read every row once. Raises StoreError at the first that does not match its checksum."""
        for first in range(0, self.n_rows, _ROWS_PER_CHECK):
            self.read_rows(torch.arange(first, min(first + _ROWS_PER_CHECK, self.n_rows)))

    def close(self) -> None:
        """Close the files; reading again opens them again."""
        with self._lock:
            for shard in self._open.values():
                shard.close()
            self._open.clear()

    def _gather(self, shard: int, local: np.ndarray, mapped: bool) -> PackedRows:
        """Rows of one shard, checked; they are valid until the next call."""
        rows, sums_B = self._open_shard(shard).gather(local, self._scratch_RE, mapped)
        wrong = np.flatnonzero(row_sums(rows) != sums_B)
        if wrong.size:
            path = self.shards[shard].path
            raise StoreError(f"store: row {int(local[wrong[0]])} of shard {str(path)!r} does not match its checksum")
        return rows

    def _open_shard(self, index: int) -> _OpenShard:
        if index in self._open:
            self._open.move_to_end(index)
        else:
            self._open[index] = _OpenShard(self.shards[index], self.layout)
            if len(self._open) > _MAX_OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        return self._open[index]

    def _limit_resident(self) -> None:
        """Pages stay in the system's cache, but no longer count as this process's memory once they are let go."""
        if self.n_bytes <= self._resident_bytes:
            return
        if _mapped_bytes() - self._mapped_before > self._resident_bytes:
            for shard in self._open.values():
                shard.release_pages()
            self._mapped_before = _mapped_bytes()


def _mapped_bytes() -> int:
    """Bytes of files that count as this process's memory. One touch may map a page or two megabytes of them.

    Where the system does not tell, 0: its own judgement of what stays in memory has to do.
    """
    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:
            return int(file.read().split()[2]) * mmap.PAGESIZE
    except OSError:
        return 0


class _Pace:
    """Which of two ways has read a row faster of late. The other one is tried now and then; it changes no value."""

    def __init__(self) -> None:
        self._n_calls = 0
        self._seconds_a_row = {True: 0.0, False: 0.0}

    def choose(self) -> bool:
        self._n_calls += 1
        best = self._seconds_a_row[True] <= self._seconds_a_row[False]
        return not best if self._n_calls % _CALLS_PER_TRIAL == 0 else best

    def note(self, way: bool, seconds: float, n_rows: int) -> None:
        if n_rows:
            last = self._seconds_a_row[way]
            self._seconds_a_row[way] = seconds / n_rows if last == 0 else 0.7 * last + 0.3 * seconds / n_rows


class _OpenShard:
    """A shard, mapped into memory."""

    def __init__(self, shard: Shard, layout: Layout) -> None:
        self._file = open(shard.path, "rb")  # noqa: SIM115
        self._path = shard.path
        n_rows, n_scales = shard.n_rows, layout.n_scales
        self._size = shard.offset + n_rows * layout.row_bytes
        self._check_size()
        self._mmap = mmap.mmap(self._file.fileno(), self._size, access=mmap.ACCESS_READ)
        data = np.frombuffer(self._mmap, dtype=np.uint8, offset=shard.offset)
        scales_end = 4 * n_rows * (1 + n_scales)
        self._sums_R = data[: 4 * n_rows].view(np.int32)
        self._scales_RMP: Any = None
        if n_scales:
            self._scales_RMP = data[4 * n_rows : scales_end].view(np.float32).reshape(n_rows, *layout.dims[:2])
        self._acts_at = shard.offset + scales_end
        self._acts_RE = data[scales_end:].reshape(n_rows, layout.acts_bytes)

    def gather(self, local: np.ndarray, scratch_RE: np.ndarray, mapped: bool) -> tuple[PackedRows, np.ndarray]:
        self._check_size()
        scales = None if self._scales_RMP is None else torch.from_numpy(self._scales_RMP[local])
        acts_BE = scratch_RE[: len(local)]
        if mapped:
            np.take(self._acts_RE, local, axis=0, out=acts_BE, mode="clip")
        else:
            self._read_runs(local, acts_BE)
        return PackedRows(torch.from_numpy(acts_BE), scales), self._sums_R[local]

    def _read_runs(self, local: np.ndarray, acts_BE: np.ndarray) -> None:
        """One read from the file for each run of consecutive rows."""
        row_bytes = acts_BE.shape[1]
        starts = np.concatenate([[0], np.flatnonzero(np.diff(local) != 1) + 1])
        ends = [*starts[1:].tolist(), len(local)]
        view: Any = memoryview(acts_BE.reshape(-1))  # pyright: ignore[reportArgumentType]
        descriptor = self._file.fileno()
        for start, end, row in zip(starts.tolist(), ends, local[starts].tolist(), strict=True):
            part = view[start * row_bytes : end * row_bytes]
            if os.preadv(descriptor, [part], self._acts_at + row * row_bytes) != len(part):
                raise self._shorter()

    def _check_size(self) -> None:
        """Touching mapped pages beyond the end of a file would end the process."""
        if os.fstat(self._file.fileno()).st_size < self._size:
            raise self._shorter()

    def _shorter(self) -> StoreError:
        return StoreError(f"store: shard {str(self._path)!r} became shorter while it was read; it is damaged")

    def release_pages(self) -> None:
        if hasattr(mmap, "MADV_DONTNEED"):
            self._mmap.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        self._file.close()
