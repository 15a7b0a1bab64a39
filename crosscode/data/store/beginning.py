"""What must hold before a store is written: its folder is free or holds the same, and nobody else writes there."""

from __future__ import annotations

import os
from contextlib import ExitStack, closing
from pathlib import Path

from crosscode.data.store.claim import MARKER, Claim
from crosscode.data.store.format import StoreError
from crosscode.data.store.manifest import UNFINISHED, Manifest, check_same_content, read_manifest
from crosscode.data.store.place import Place, RemotePath, place
from crosscode.data.store.reader import check_no_links, list_shards
from crosscode.files import held, is_temporary


def check_can_write(path: str | Path, wanted: Manifest) -> Manifest | None:
    """Raise StoreError where a writer could not begin: nothing is made, and nothing is read but headers.

    `wanted`: as much of the manifest as is known. Returns the manifest that is there already.
    """
    folder = place(path)
    if isinstance(folder, Path):
        nearest = next(where for where in (folder, *folder.absolute().parents) if where.exists())
        if not nearest.is_dir():
            raise StoreError(f"store {str(path)!r}: {str(nearest)!r} is a file, not a folder")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise StoreError(f"store {str(path)!r} cannot be written: {str(nearest)!r} is read-only")
    check_no_links(folder)
    stored = read_manifest(folder) or read_manifest(folder, UNFINISHED)
    if stored is None:
        check_free(folder)
        return None
    check_same_content(folder, stored, wanted, to_append=True, partly=True)
    list_shards(folder, stored)
    if any((folder / name).exists() for name in ("lock", MARKER)):
        take_lock(folder)[0].close()
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
