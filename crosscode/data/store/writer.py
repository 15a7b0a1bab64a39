"""The activation store, to write: shard by shard, by one process at a time, from the last whole shard on.

R rows · M models · P hookpoints · D model dimension.

    manifest.json                    what the rows are; written once, before the first shard
    shard-000000.safetensors ...     the rows; each appears whole or not at all
    resume-000001-<crc>.safetensors  position of the data after that many shards
    lock                             held by the process that writes

The position is written before the shard that it follows and the older one is removed afterwards, so that the last
whole shard always has its position.
"""

from __future__ import annotations

import json
import os
import zlib
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from crosscode.data.schemas import PositionHeader
from crosscode.data.store.format import LABELS_BYTES, PackedRows, StoreError, StoreNotWritten, pack, unpack, write_shard
from crosscode.data.store.manifest import (
    Manifest,
    check_same_content,
    content_id,
    layout_of,
    read_manifest,
    write_manifest,
)
from crosscode.data.store.reader import check_no_links, list_shards, positions
from crosscode.data.store.token_hash import TokenHash
from crosscode.data.text.labels import Labels
from crosscode.errors import check_at_least, fitting
from crosscode.files import held, is_temporary, remove, write_parts
from crosscode.stored import parse_json


class ActivationCacheWriter:
    """Appends rows to a store; makes the store where there is none.

    `path`: its folder. `manifest`: what the rows are (`make_manifest`). A store that holds something else is refused by
    the field that differs, and nothing of it is touched. `shard_bytes`: size at which a shard is closed. `max_bytes`:
    the store stops growing below this size. Raises StoreError where another process writes the store, the folder cannot
    be written, or the disk is full (whole shards stay as they are, and nothing more is kept). A store whose data is at
    its end is locked by nobody.

    A context manager: leaving it writes the rows that wait, then releases the store.
    """

    def __init__(
        self, path: str | Path, manifest: Manifest, *, shard_bytes: int = 256 << 20, max_bytes: int | None = None
    ) -> None:
        check_at_least(1, shard_bytes=shard_bytes, max_bytes=max_bytes)
        self.path = Path(path)
        self.layout = layout_of(manifest)
        self._content = content_id(manifest)
        self._shard_bytes = shard_bytes
        self._max_bytes = max_bytes
        self._waiting: list[PackedRows] = []
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
        self._lock = _take_lock(self.path)
        try:
            stored = read_manifest(self.path)
            if stored is None:
                _check_free(self.path)
                write_manifest(self.path, manifest)
            else:
                check_same_content(self.path, stored, manifest, to_append=True)
                self._content = content_id(stored)
                self._takes_labels = stored["version"] > 1  # who reads the first version knows of none
            shards = list_shards(self.path, stored or manifest)
            self.n_shards = len(shards)
            self.n_rows = sum(shard.n_rows for shard in shards)
            self._token_hash = TokenHash.after(shards[-1].token_hash) if shards else TokenHash()
            self.n_bytes = sum(shard.path.stat().st_size for shard in shards)
            self.resume_state, self.finished = _read_resume(self.path, self.n_shards)
            for leftover in [*_unfinished(self.path), *_other_positions(self.path, self.n_shards)]:
                remove(leftover)
            if self.finished:
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
        n_bytes = rows.acts_RE.shape[0] * (self.layout.row_bytes + (LABELS_BYTES if labels is not None else 0))
        if self._max_bytes is not None and not self.full:
            self.full = self.n_bytes + self._waiting_bytes + n_bytes > self._max_bytes - self._header_allowance
            if self.full:
                self.flush()
        if not self.full and not self.finished:
            self._waiting.append(rows)
            self._labels.append(labels)
            self._waiting_bytes += n_bytes
            self._norm_sum_MP += norm_sum_MP
            self._token_hash = self._token_hash and self._token_hash.with_tokens(tokens_R)
            self._state = state
            if self._waiting_bytes >= self._shard_bytes:
                self.flush()
        return unpack(rows, self.layout)

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
        elif self.resume_state is not None:
            self._guarded(_write_resume, self.path, self.n_shards, self.resume_state, True)
        self.finished = True
        self._release()

    def close(self) -> None:
        """Write what waits and let other processes write."""
        try:
            self.flush()
        finally:
            self._release()

    def __enter__(self) -> ActivationCacheWriter:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, StoreError):
            self._release()
        else:
            self.close()

    def _write_shard(self, finished: bool) -> None:
        assert self._state is not None
        info = {"norm_sums": self._norm_sum_MP.tolist(), "content": self._content}
        info |= {} if self._token_hash is None else {"token_hash": str(self._token_hash)}
        known = [one.packed_R3().numpy() for one in self._labels if one and self._takes_labels]
        labels_R3 = np.concatenate(known) if len(known) == len(self._waiting) else None
        _write_resume(self.path, self.n_shards + 1, self._state, finished)
        self.n_bytes += write_shard(self.path, self.n_shards, self.layout, self._waiting, info, labels_R3)
        self.n_rows += sum(rows.acts_RE.shape[0] for rows in self._waiting)
        self.n_shards += 1
        self.resume_state = self._state
        self._waiting, self._labels, self._waiting_bytes, self._state = [], [], 0, None
        self._norm_sum_MP = torch.zeros_like(self._norm_sum_MP)
        for old in _other_positions(self.path, self.n_shards):
            old.unlink()

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


def check_can_write(path: str | Path, wanted: Manifest) -> Manifest | None:
    """Raise StoreError where a writer could not begin: nothing is made, and nothing is read but headers.

    `wanted`: as much of the manifest as is known. Returns the manifest that is there already.
    """
    folder = Path(path)
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not nearest.is_dir():
        raise StoreError(f"store {str(path)!r}: {str(nearest)!r} is a file, not a folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise StoreError(f"store {str(path)!r} cannot be written: {str(nearest)!r} is read-only")
    check_no_links(folder)
    stored = read_manifest(folder)
    if stored is None:
        _check_free(folder)
        return None
    check_same_content(folder, stored, wanted, to_append=True, partly=True)
    list_shards(folder, stored)
    if (folder / "lock").exists():
        _take_lock(folder).close()
    return stored


def _unfinished(folder: Path) -> list[Path]:
    """Files of ours that were being written when a process ended."""
    return [path for path in folder.iterdir() if is_temporary(path)]


def _check_free(folder: Path) -> None:
    """Refuse to begin a store among other files."""
    if not folder.exists():
        return
    if any(folder.glob("shard-*.safetensors")):
        raise StoreError(f"store {str(folder)!r} holds shards but no manifest.json")
    foreign = {*folder.iterdir()} - {folder / "lock", *_unfinished(folder)}
    if foreign:
        raise StoreError(
            f"store {str(folder)!r} is not a store, but holds files already ({min(foreign).name}); name an empty "
            "folder or a new one"
        )


def _take_lock(folder: Path) -> ExitStack:
    """Held until it is closed, by whichever thread."""
    lock = ExitStack()
    lock.enter_context(held(folder / "lock", f"store {str(folder)!r} is being written by another process", StoreError))
    return lock


def _other_positions(folder: Path, n_shards: int) -> list[Path]:
    """Positions after another number of shards: of a shard that was never finished, or that others came after.

    The next shard may end elsewhere than the unfinished one would have; its position must not be mistaken for that.
    """
    return [path for path, n_before in positions(folder).items() if n_before != n_shards]


def _write_resume(folder: Path, n_shards: int, state: dict[str, Any], finished: bool) -> None:
    tensors = {key: value.contiguous() for key, value in state.items() if isinstance(value, torch.Tensor)}
    plain = {key: value for key, value in state.items() if key not in tensors}
    content = safetensors.torch.save(tensors, {"state": json.dumps(plain), "finished": str(int(finished))})
    write_parts(folder / f"resume-{n_shards:06d}-{zlib.crc32(content):08x}.safetensors", [content])


def _read_resume(folder: Path, n_shards: int) -> tuple[dict[str, Any] | None, bool]:
    """The position after `n_shards` shards, and whether the data is at its end; (None, False) before the first."""
    found = [read_position(path) for path in sorted(folder.glob(f"resume-{n_shards:06d}-*.safetensors"))]
    if found:
        return max(found, key=lambda item: item[1])
    if n_shards:
        raise StoreError(
            f"store {str(folder)!r}: the position after shard {n_shards - 1} is missing; it can be read only"
        )
    return None, False


def read_position(path: Path) -> tuple[dict[str, Any], bool]:
    content, where = path.read_bytes(), f"store: {str(path)!r}"
    if path.name.split("-")[2] != f"{zlib.crc32(content):08x}.safetensors":
        raise StoreError(f"{where} does not match the checksum in its name; the store can be read only")
    header = content[8 : 8 + int.from_bytes(content[:8], "little")]
    metadata = parse_json(header, PositionHeader, where, StoreError)["__metadata__"]
    with fitting(f"{where}: the position"):
        tensors = safetensors.torch.load(content)
    plain = parse_json(metadata["state"], dict[str, Any], where, StoreError)
    return {**plain, **tensors}, metadata["finished"] == "1"
