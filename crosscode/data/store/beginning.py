"""What must hold before a store is written: its folder is free or holds the same, and nobody else writes there."""

from __future__ import annotations

import os
from contextlib import ExitStack, closing
from pathlib import Path

from crosscode.data.store.claim import MARKER, Claim
from crosscode.data.store.format import StoreError, StoreNotWritten
from crosscode.data.store.manifest import UNFINISHED, Manifest, check_same_content, read_manifest
from crosscode.data.store.place import Place, RemotePath, place
from crosscode.data.store.reader import check_no_links, list_shards
from crosscode.errors import readable
from crosscode.files import held, is_temporary


def check_can_write(path: str | Path, wanted: Manifest, *, to_hold: bool = True) -> Manifest | None:
    """Raise InputError (StoreError where it is the store's) if a writer could not begin: nothing is made, and nothing is read
    but headers. Object stores tell only who writes there: a marker is created, and removed.

    `wanted`: as much of the manifest as is known. `to_hold`: whether this process would hold the lock, not another one of
    several that write together. Returns the manifest that is there already.
    """
    folder = place(path)
    if isinstance(folder, Path):
        nearest = next(where for where in (folder, *folder.absolute().parents) if where.exists())
        if not nearest.is_dir():
            raise StoreError(f"store {str(path)!r}: {str(nearest)!r} is a file, not a folder")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise StoreError(f"store {str(path)!r} cannot be written: {str(nearest)!r} is read-only")
    check_no_links(folder)
    with readable(f"store {str(path)!r}"):
        stored = read_manifest(folder) or read_manifest(folder, UNFINISHED)
        if stored is None:
            check_free(folder)
        else:
            check_same_content(folder, stored, wanted, to_append=True, partly=True)
            list_shards(folder, stored)
        to_try = isinstance(folder, RemotePath) and not folder.has_folders
        to_hold &= to_try or any((folder / name).exists() for name in ("lock", MARKER))
    if to_hold:
        try:
            take_lock(folder)[0].close()
        except OSError as error:
            raise StoreNotWritten(f"store {str(path)!r} cannot be written: {error.strerror or error}") from error
    return stored


def unfinished(folder: Place) -> list[Place]:
    """Files of ours that were being written when a process ended."""
    return [path for path in folder.iterdir() if is_temporary(Path(path.name))]


def check_free(folder: Place) -> None:
    """Refuse to begin a store among other files."""
    if not folder.exists():
        return
    if any(folder.glob("shard-*.safetensors")):
        raise StoreError(f"store {str(folder)!r} holds shards but no manifest.json")
    foreign = {*folder.iterdir()} - {folder / "lock", folder / MARKER, *unfinished(folder)}
    if foreign:
        raise StoreError(
            f"store {str(folder)!r} is not a store, but holds files already ({min(foreign).name}); name an empty "
            "folder or a new one"
        )


def take_lock(folder: Place) -> tuple[ExitStack, str]:
    """Held until it is closed, by whichever thread; and the token of a claim."""
    lock, refusal = ExitStack(), f"store {str(folder)!r} is being written by another process"
    if isinstance(folder, RemotePath):
        return lock, lock.enter_context(closing(Claim(folder, refusal))).token
    lock.enter_context(held(folder / "lock", refusal, StoreError))
    return lock, ""
