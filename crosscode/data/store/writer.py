"""The activation store, to write: shard by shard, by one process at a time, from the last whole shard on.

R rows · M models · P hookpoints · D model dimension.

    manifest.json                    what the rows are; written once, before the first shard
    shard-000000.safetensors ...     the rows; each appears whole or not at all
    resume-000001-<crc>.safetensors  position of the data after that many shards
    lock                             held by the process that writes; remotely `writer`, see `claim`

Remotely, and where ranks write, the manifest has another name until the writer is closed: who reads finds a store whose first
harvest ended, or none.

The position is written before the shard that it follows and the older one is removed afterwards, so that the last
whole shard always has its position.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

from crosscode.data.store.beginning import check_free, take_lock, unfinished
from crosscode.data.store.claim import MARKER, check_held
from crosscode.data.store.format import LABELS_BYTES, PackedRows, StoreError, StoreNotWritten, pack, unpack, write_shard
from crosscode.data.store.manifest import (
    UNFINISHED,
    Manifest,
    check_same_content,
    content_id,
    layout_of,
    read_manifest,
    write_manifest,
)
from crosscode.data.store.place import Place, RemotePath, place
from crosscode.data.store.positions import last_position, other_positions, write_position
from crosscode.data.store.reader import ahead, check_no_links, list_shards
from crosscode.data.store.token_hash import TokenHash
from crosscode.data.text.labels import Labels
from crosscode.errors import check_at_least
from crosscode.files import remove


class ActivationCacheWriter:
    """Appends rows to a store; makes the store where there is none.

    `path`: its folder, or a URL. `manifest`: what the rows are (`make_manifest`). A store that holds something else is refused by
    the field that differs, and nothing of it is touched. `shard_bytes`: size at which a shard is closed. `max_bytes`:
    the store stops growing below this size. Raises StoreError where another process writes the store, the folder cannot
    be written, or the disk is full (whole shards stay as they are, and nothing more is kept). A store whose data is at
    its end is locked by nobody.

    `owns`: where ranks write one store, which shards this one writes. All ranks call the same methods in the same order
    (`pass_over` in place of `append` for the shards of others); the one that owns shard 0 opens first, alone (`token` is then
    for the others), and closes last.

    A context manager: leaving it writes the rows that wait, then releases the store; where ranks write, an error leaves those
    rows out, as other ranks may be elsewhere.
    """

    def __init__(
        self,
        path: str | Place,
        manifest: Manifest,
        *,
        shard_bytes: int = 256 << 20,
        max_bytes: int | None = None,
        owns: Callable[[int], bool] | None = None,
        token: str = "",
    ) -> None:
        check_at_least(1, shard_bytes=shard_bytes, max_bytes=max_bytes)
        self.path = place(path)
        self._owns, self.token = owns, token
        self._leads = owns is None or owns(0)
        self._unfinished = isinstance(self.path, RemotePath) or owns is not None
        self.layout = layout_of(manifest)
        self._content = content_id(manifest)
        self._shard_bytes = shard_bytes
        self._max_bytes = max_bytes
        self._waiting: list[PackedRows | None] = []
        self._labels: list[Labels | None] = []
        self._takes_labels = True
        self._waiting_bytes = 0
        self._norm_sum_MP = torch.zeros(self.layout.dims[:2], dtype=torch.float64)
        self._token_hash: TokenHash | None = TokenHash()
        self._state: dict[str, Any] | None = None
        self.full = False
        self.finished = False
        self.n_shards = self.n_rows = self.n_bytes = 0
        self.resume_state: dict[str, Any] | None = None
        self._lock: ExitStack | None = None
        self._guarded(self._open, manifest)

    def _open(self, manifest: Manifest) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        check_no_links(self.path)
        if self._leads:
            self._lock, self.token = take_lock(self.path)
        try:
            stored = read_manifest(self.path)
            if stored is not None:
                self._unfinished = False
            elif (stored := read_manifest(self.path, UNFINISHED)) is not None:
                self._unfinished = True
            if stored is None:
                check_free(self.path)
                write_manifest(self.path, manifest, *([UNFINISHED] if self._unfinished else []))
            else:
                check_same_content(self.path, stored, manifest, to_append=True)
                self._content = content_id(stored)
                self._takes_labels = stored["version"] > 1  # who reads the first version knows of none
            shards = list_shards(self.path, stored or manifest)
            self.n_shards = len(shards)
            self.n_rows = sum(shard.n_rows for shard in shards)
            self._token_hash = TokenHash.after(shards[-1].token_hash) if shards else TokenHash()
            self.n_bytes = sum(shard.path.stat().st_size for shard in shards)
            self.resume_state, self.finished = last_position(self.path, self.n_shards)
            if self._leads:
                old = [*other_positions(self.path, self.n_shards), *ahead(self.path, self.n_shards)]
                for leftover in [*unfinished(self.path), *old]:
                    remove(leftover)  # pyright: ignore[reportArgumentType]
            if self.finished:
                self._publish()
                self._release()
        except BaseException:
            self._release()
            raise

    def append(
        self,
        acts_RMPD: torch.Tensor,
        state: dict[str, Any],
        tokens_R: torch.Tensor | None = None,
        labels: Labels | None = None,
    ) -> torch.Tensor:
        """Add rows; `state` is the position of the data after them, `tokens_R` their token ids, `labels` what is known of
        them. Returns them as the store will give them back.

        Rows that no longer fit below `max_bytes` are not kept, and `full` is set.
        """
        rows = pack(acts_RMPD, self.layout.dtype)
        norm_sum_MP = acts_RMPD.detach().float().norm(dim=-1).double().sum(dim=0).cpu()
        if not bool(torch.isfinite(norm_sum_MP).all()):
            raise StoreError(f"store {str(self.path)!r}: an activation is not finite; nothing of this batch was stored")
        n_bytes = self._fitting(rows.acts_RE.shape[0], labels)
        if not self.full and not self.finished:
            self._norm_sum_MP += norm_sum_MP
            self._take(rows, n_bytes, state, tokens_R, labels)
        return unpack(rows, self.layout)

    def begin(self, state: dict[str, Any]) -> None:
        """Before ranks write: the position before shard 0, which may come after others."""
        if self.resume_state is None:
            self._guarded(write_position, self.path, 0, state, False)

    def pass_over(self, n_rows: int, state: dict[str, Any], tokens_R: torch.Tensor, labels: Labels | None) -> None:
        """In place of `append`, for rows of a shard that another rank writes."""
        n_bytes = self._fitting(n_rows, labels)
        if not self.full and not self.finished:
            self.n_rows += n_rows
            self._take(None, n_bytes, state, tokens_R, labels)

    @property
    def is_own(self) -> bool:
        """Whether this rank writes the shard that comes next."""
        return self._owns is None or self._owns(self.n_shards)

    def _fitting(self, n_rows: int, labels: Labels | None) -> int:
        """Bytes of these rows; sets `full` where they do not fit."""
        n_bytes = n_rows * (self.layout.row_bytes + (LABELS_BYTES if labels is not None else 0))
        if self._max_bytes is not None and not self.full:
            self.full = self.n_bytes + self._waiting_bytes + n_bytes > self._max_bytes - self._header_allowance
            if self.full:
                self.flush()
        return n_bytes

    def _take(self, rows: PackedRows | None, n_bytes: int, state: dict[str, Any], tokens_R: Any, labels: Any) -> None:
        self._waiting.append(rows)
        self._labels.append(labels)
        self._waiting_bytes += n_bytes
        self._token_hash = self._token_hash and self._token_hash.with_tokens(tokens_R)
        self._state = state
        if self._waiting_bytes >= self._shard_bytes:
            self.flush()

    @property
    def _header_allowance(self) -> int:
        return 1024 + 32 * self.layout.dims[0] * self.layout.dims[1]

    def flush(self) -> None:
        """Close the current shard with the rows that wait."""
        if self._waiting:
            self._guarded(self._write_shard, False)

    def finish(self) -> None:
        """Write what waits and record that the data is at its end."""
        if self.full or self.finished:
            return
        if self._waiting:
            self._guarded(self._write_shard, True)
        elif self.resume_state is not None and self._leads:
            self._guarded(write_position, self.path, self.n_shards, self.resume_state, True)
        self.finished = True
        if self._owns is None:
            self._publish()
            self._release()

    def close(self) -> None:
        """Write what waits and let other processes write."""
        try:
            self.flush()
            self._publish()
        finally:
            self._release()

    def forget_positions(self) -> None:
        """Those before the last shard, which all ranks have reached."""
        for old in other_positions(self.path, self.n_shards) if self._leads else []:
            old.unlink()

    def _publish(self) -> None:
        """From now on it is a store."""
        if self._unfinished and self._lock is not None:
            manifest = read_manifest(self.path, UNFINISHED)
            if manifest is not None:
                self._guarded(write_manifest, self.path, manifest)
                (self.path / UNFINISHED).unlink(missing_ok=True)
            self._unfinished = False

    def __enter__(self) -> ActivationCacheWriter:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, StoreError) or (error is not None and self._owns is not None):
            self._release()
        else:
            self.close()

    def _write_shard(self, finished: bool) -> None:
        assert self._state is not None
        if self.is_own:
            self._write_own(self._state, finished)
        else:
            self.n_bytes += self._waiting_bytes + self._header_allowance
        self.n_shards += 1
        self.resume_state = self._state
        self._waiting, self._labels, self._waiting_bytes, self._state = [], [], 0, None
        self._norm_sum_MP = torch.zeros_like(self._norm_sum_MP)
        if self._owns is None:
            self.forget_positions()

    def _write_own(self, state: dict[str, Any], finished: bool) -> None:
        rows = [part for part in self._waiting if part is not None]
        info = {"norm_sums": self._norm_sum_MP.tolist(), "content": self._content}
        info |= {} if self._token_hash is None else {"token_hash": str(self._token_hash)}
        known = [one.packed_R3().numpy() for one in self._labels if one and self._takes_labels]
        labels_R3 = np.concatenate(known) if len(known) == len(self._waiting) else None
        if isinstance(self.path, RemotePath):
            check_held(self.path / MARKER, self.token)
        write_position(self.path, self.n_shards + 1, state, finished)
        n_bytes = write_shard(self.path, self.n_shards, self.layout, rows, info, labels_R3)
        # Ranks must agree when a store is full, and know of each other's headers only how long they may be.
        self.n_bytes += n_bytes if self._owns is None else self._waiting_bytes + self._header_allowance
        self.n_rows += sum(part.acts_RE.shape[0] for part in rows)

    def _guarded(self, action: Any, *args: Any) -> None:
        """Turn an error of the system into one line that says what is kept."""
        try:
            action(*args)
        except OSError as error:
            kept = f"; {self.n_shards} whole shards ({self.n_rows} rows) are kept" if self._lock is not None else ""
            # Rows are lost: whatever came after them must not follow those that are kept.
            self._waiting, self._labels, self._waiting_bytes, self.full = [], [], 0, True
            raise StoreNotWritten(
                f"store {str(self.path)!r} cannot be written: {error.strerror or error}{kept}"
            ) from error

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None
