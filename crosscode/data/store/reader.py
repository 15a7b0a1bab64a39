"""The activation store, to read.

B rows asked for at once · R rows, ascending · N runs of consecutive rows · E bytes of a row · M models · P hookpoints ·
D model dimension.
"""

from __future__ import annotations

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from crosscode.data.store.format import (
    PackedRows,
    StoreError,
    read_labels,
    read_shard_header,
    row_sums,
    shard_name,
    unpack,
)
from crosscode.data.store.manifest import UNFINISHED, Manifest, check_same_content, content_id, layout_of, read_manifest
from crosscode.data.store.place import Place, RemotePath, for_each, place, read_remote_runs
from crosscode.data.store.positions import positions
from crosscode.data.text.labels import Labels
from crosscode.errors import readable

_MAX_OPEN_SHARDS = 128
_ROWS_PER_CHECK = 8192
_BYTES_AT_ONCE = 1 << 20
_FEWEST_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Shard:
    """A whole shard: its rows, where its data begins, and the sums of norms `norm_sum_MP` of its activations.

    `token_hash` is that of the token ids of all rows up to its end, `labels` the checksum of its rows' labels; both are None in
    earlier stores.
    """

    path: Place
    n_rows: int
    offset: int
    norm_sum_MP: torch.Tensor
    token_hash: str | None = None
    labels: str | None = None


def list_shards(folder: Place, manifest: Manifest) -> list[Shard]:
    """Every whole shard, in order. Raises StoreError for a missing or truncated one, and for one of another manifest.

    A shard that is missing behind the last position is not missing: see `ahead`.
    Shards carry the `content_id` that they were written for; of earlier ones, without it, nothing is known.
    """
    layout, content = layout_of(manifest), content_id(manifest)
    # Before the shards are listed: a process that writes here removes a position only after the next shard is whole.
    n_written = min(written := [*positions(folder).values()], default=0)
    paths = sorted(folder.glob("shard-*.safetensors"))
    whole = [path for index, path in enumerate(paths) if path.name == shard_name(index)]
    if len(whole) < len(paths) and not (written and n_written <= len(whole) and all(map(is_shard, paths))):
        missing = folder / shard_name(len(whole))
        raise StoreError(f"store: shard {str(missing)!r} is missing, though {paths[len(whole)].name} is there")
    headers = for_each(lambda of: read_shard_header(of[1], of[0], layout), enumerate(whole), folder)
    shards = []
    for path, (n_rows, offset, info) in zip(whole, headers, strict=True):
        theirs = info.get("content", content)
        if theirs != content:
            raise StoreError(
                f"store {str(folder)!r}: shard {path.name} was written for another manifest ({theirs}) than the one in "
                f"this folder ({content}); one of the two was copied here"
            )
        norm_sum_MP = torch.tensor(info["norm_sums"], dtype=torch.float64)
        shards.append(Shard(path, n_rows, offset, norm_sum_MP, info.get("token_hash"), info.get("labels")))
    if len(shards) < n_written and (shards or n_written > 1):  # the very first position comes before any shard
        raise StoreError(f"store {str(folder)!r}: {len(shards)} shards are there, but {n_written} were written")
    return shards


def is_shard(path: Place) -> bool:
    return re.fullmatch(r"shard-\d{6,}\.safetensors", path.name) is not None


def ahead(folder: Place, n_shards: int) -> list[Place]:
    """Shards behind a gap, of ranks that were ahead of another when all ended: nobody reads them."""
    return [path for path in sorted(folder.glob("shard-*.safetensors"))[n_shards:] if is_shard(path)]


def check_no_links(folder: Place) -> None:
    """Raise StoreError for a link in a store: what is read, written or removed through it would lie elsewhere."""
    for path in sorted(folder.iterdir()) if isinstance(folder, Path) and folder.is_dir() else []:
        if path.is_symlink():
            raise StoreError(f"store: {str(path)!r} is a link, which is not followed; put what it names here")
        if not (path.is_file() or path.is_dir()):
            raise StoreError(f"store: {str(path)!r} is no file, and would be waited for; move it away")


class ActivationCache:
    """A store of activations on disk, opened to read; `ActivationCacheWriter` makes one.

    `path`: its folder. `expected`: the manifest of the run that wants to read it (`make_manifest`); a store with other
    content is refused by the field that differs. `unfinished`: also one whose writer has not ended. Rows of `dims` =
    (M, P, D) may be read in any order, are checked against their checksums each time, and are handed out as float32
    (bfloat16 for a bfloat16 store). Files are read by position and never mapped, so that nothing of a store counts as this
    process's memory but the rows that it asked for. Of a remote store (`path` is a URL) many are asked for at a time.

    Reading needs neither the models nor the writer's lock: a store may grow while it is read, and `refresh` takes
    notice. Several threads may read from one object; they take turns.

    Raises:
        StoreError: no store there, or one of other content.
    """

    def __init__(self, path: str | Place, *, expected: Manifest | None = None, unfinished: bool = False) -> None:
        self.path = place(path)
        check_no_links(self.path)
        with readable(f"store {str(path)!r}"):
            self._open_manifest(expected, unfinished)
            self.refresh()

    def _open_manifest(self, expected: Manifest | None, unfinished: bool) -> None:
        manifest = read_manifest(self.path)
        draft = read_manifest(self.path, UNFINISHED) if manifest is None else None
        manifest = draft if unfinished and draft is not None else manifest
        if manifest is None:
            why = (
                "its harvest has not ended; the same command goes on"
                if draft
                else "there is no manifest.json in that folder"
            )
            raise StoreError(f"store {str(self.path)!r}: no such store ({why})")
        if expected is not None:
            check_same_content(self.path, manifest, expected, to_append=False)
        self.manifest = manifest
        self.layout = layout_of(manifest)
        self.dims, self.dtype = self.layout.dims, self.layout.read_dtype
        self._open: OrderedDict[int, BinaryIO] = OrderedDict()
        self._lock = threading.Lock()

    def refresh(self) -> None:
        """Take notice of shards that were written since."""
        self.shards = list_shards(self.path, self.manifest)
        self._sizes = np.array([shard.n_rows for shard in self.shards], dtype=np.int64)
        self._ends = np.cumsum(self._sizes)
        self._offsets = np.array([shard.offset for shard in self.shards], dtype=np.int64)
        self.n_bytes = int((self._offsets + self._sizes * self.layout.row_bytes).sum())

    @property
    def n_rows(self) -> int:
        """Rows in whole shards."""
        return int(self._ends[-1]) if self.shards else 0

    @property
    def is_remote(self) -> bool:
        """Whether reads are worth being made ahead."""
        return isinstance(self.path, RemotePath)

    def __len__(self) -> int:
        return self.n_rows

    def __str__(self) -> str:
        return f"store {str(self.path)!r}"

    def check_not_empty(self) -> None:
        """Raise StoreError where there is no row to read."""
        if not self.shards:
            raise StoreError(f"store {str(self.path)!r} holds no whole shard yet")

    def content(self) -> str:
        """What the store holds, in 8 hex digits."""
        return content_id(self.manifest)

    def mean_norm_MP(self) -> torch.Tensor:
        """Mean norm of the activations (float64), over every row, as recorded while they were written."""
        self.check_not_empty()
        return torch.stack([shard.norm_sum_MP for shard in self.shards]).sum(dim=0) / self.n_rows

    def scaling_MP(self) -> torch.Tensor:
        """`sqrt(D) / mean ||x||` over the whole store (float32)."""
        return (self.dims[2] ** 0.5 / self.mean_norm_MP()).float()

    def labels(self) -> Labels | None:
        """What each row is known by, in stored order: its role, its text (named in `manifest["sources"]`), its document. None in
        earlier stores. Raises StoreError where they do not match their checksum."""
        if any(shard.labels is None for shard in self.shards):
            return None
        parts = for_each(lambda shard: read_labels(shard.path, shard.n_rows, shard.labels), self.shards, self.path)
        return Labels.unpacked(torch.cat([torch.empty(0, 3, dtype=torch.int32), *parts]))

    def read_rows(self, index_B: torch.Tensor) -> torch.Tensor:
        """`acts_BMPD` of the rows `index_B` (int64). Raises StoreError if a row does not match its checksum."""
        ascending_B, order_B = index_B.sort()
        acts_BMPD = unpack(self.read_ascending(ascending_B.numpy()), self.layout)
        return torch.empty_like(acts_BMPD).index_copy_(0, order_B, acts_BMPD)

    def read_ascending(self, index_R: np.ndarray, out: PackedRows | None = None) -> PackedRows:
        """The rows `index_R` (int64, ascending) as they lie on disk, into `out` if it is given.

        Consecutive rows take one read together.

        Raises:
            StoreError: as `read_rows`.
        """
        if index_R.size and (index_R[0] < 0 or index_R[-1] >= self.n_rows):
            asked = int(index_R[0] if index_R[0] < 0 else index_R[-1])
            raise StoreError(f"store {str(self.path)!r}: row {asked} asked for, but it has {self.n_rows}")
        out = PackedRows.empty(len(index_R), self.layout) if out is None else out
        n_at_once = max(_FEWEST_ROWS_AT_ONCE, _BYTES_AT_ONCE // self.layout.row_bytes)
        n_at_once = max(n_at_once, len(index_R)) if self.is_remote else n_at_once
        with self._lock:
            for first in range(0, len(index_R), n_at_once):
                part = slice(first, first + n_at_once)
                self._read_checked(index_R[part], out[part])
        return out

    def verify(self, done: Callable[[int], None] = lambda _: None, rows: tuple[int, int] | None = None) -> None:
        """Read every row once, or those from `rows[0]` to before `rows[1]`; `done` is told how many are. Raises StoreError at
        the first that does not match its checksum."""
        begin, end = rows or (0, self.n_rows)
        for first in range(begin, end, _ROWS_PER_CHECK):
            last = min(first + _ROWS_PER_CHECK, end)
            self.read_rows(torch.arange(first, last))
            done(last)
        self.labels()

    def close(self) -> None:
        """Close the files; reading again opens them again."""
        with self._lock:
            while self._open:
                self._open.popitem()[1].close()

    def _read_checked(self, index_R: np.ndarray, out: PackedRows) -> None:
        """So few rows that they are still in the processor's cache when their checksums are taken."""
        shard_R = np.searchsorted(self._ends, index_R, side="right")
        begins_R = np.ones(len(index_R), dtype=bool)
        begins_R[1:] = (index_R[1:] != index_R[:-1] + 1) | (shard_R[1:] != shard_R[:-1])
        first_N = np.flatnonzero(begins_R)
        shard_N = shard_R[first_N]
        local_N = self._local(index_R[first_N], shard_N)
        files_N = self._files(shard_N)
        sums_R = torch.empty(len(index_R), dtype=torch.int32)
        section_at_N = self._offsets[shard_N]
        read, came = read_remote_runs if self.is_remote else read_runs, []
        for section_RE in (sums_R.view(torch.uint8).view(-1, 4), *out.sections()):
            E = section_RE.shape[1]
            came.append(read(files_N, section_at_N + E * local_N, first_N, section_RE.numpy()))
            section_at_N = section_at_N + E * self._sizes[shard_N]
        if not all(list(chain.from_iterable(came))):  # all of them: each writes its part of `out`
            raise self._cut(shard_N)
        wrong_R = np.flatnonzero(row_sums(out) != sums_R.numpy())
        if wrong_R.size:
            shard, row = shard_R[wrong_R[0]], index_R[wrong_R[0]]
            path, local = self.shards[shard].path, int(self._local(row, shard))
            raise StoreError(f"store: row {local} of shard {str(path)!r} does not match its checksum")
        while len(self._open) > _MAX_OPEN_SHARDS:
            self._open.popitem(last=False)[1].close()

    def _local(self, index: np.ndarray, shard: np.ndarray) -> np.ndarray:
        """Numbers of rows within their shards."""
        return index - (self._ends - self._sizes)[shard]

    def _files(self, shard_N: np.ndarray) -> list[Any]:
        """Descriptors of open files; of a remote store, where they are."""
        if self.is_remote:
            return [self.shards[shard].path for shard in shard_N.tolist()]
        descriptors = {}
        for shard in np.unique(shard_N).tolist():
            if shard not in self._open:
                self._open[shard] = open(self.shards[shard].path, "rb", buffering=0)  # noqa: SIM115
            self._open.move_to_end(shard)
            descriptors[shard] = self._open[shard].fileno()
        return [descriptors[shard] for shard in shard_N.tolist()]

    def _cut(self, shard_N: np.ndarray) -> StoreError:
        """The error for a read that ended early."""
        shards = [self.shards[shard] for shard in np.unique(shard_N).tolist()]
        row_bytes = self.layout.row_bytes
        cut = [shard for shard in shards if shard.path.stat().st_size < shard.offset + shard.n_rows * row_bytes]
        path = (cut or shards)[0].path
        return StoreError(f"store: shard {str(path)!r} became shorter while it was read; it is damaged")


def read_runs(files_N: list[int], at_N: np.ndarray, first_N: np.ndarray, out_RE: np.ndarray) -> list[bool]:
    """One read a run, from byte `at_N` of its file into the rows from `first_N` on; [False] where a file ended early."""
    view: Any = memoryview(out_RE.reshape(-1))  # pyright: ignore[reportArgumentType]
    edges = [*(first_N * out_RE.shape[1]).tolist(), out_RE.size]
    parts = [[view[first:end]] for first, end in pairwise(edges)]
    return [sum(map(os.preadv, files_N, parts, at_N.tolist())) == out_RE.size]
