"""Who writes a remote store: a marker object in place of a lock, which no object store has.

What it gives: of writers that begin, one is first (where the file system creates conditionally: S3, GCS, memory); a writer looks
before each shard whether the marker is still its own, and shards are created, never written over. So a store never mixes two
writers' shards under one name. What it does not give: a writer that was suspended for longer than `_LEASE` seconds and then taken
for dead may still finish the one shard that is on its way.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
import time
from contextlib import suppress

from crosscode.data.store.format import StoreError
from crosscode.data.store.place import RemotePath

log = logging.getLogger("crosscode")

MARKER = "writer"
_BEAT = 5.0
_LEASE = 20.0
"""Seconds. No clock is compared: who finds a marker watches it for so long, and takes one that does not change for a dead
writer's."""


class Claim:
    """Held from its making to `close`.

    Raises:
        StoreError: `refusal`, where the marker is another, living writer's.
    """

    def __init__(self, folder: RemotePath, refusal: str):
        self._marker, self._refusal = folder / MARKER, refusal
        self.token, self._n_beats = secrets.token_hex(8), 0
        self._take()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()

    def _take(self) -> None:
        for _ in range(2):
            try:
                return self._marker.write(self._content(), new=True)
            except FileExistsError:
                self._marker.size = None
                before, began = self._read(), time.monotonic()
            if before:
                log.info("%s? a marker lies there; it is watched for up to %.0f s", self._refusal, _LEASE)
            while before and time.monotonic() - began < _LEASE:
                time.sleep(_BEAT / 5)
                if (now := self._read()) != before:
                    if now:
                        break
                    before = now
            else:
                if before and self._read() == before:
                    self._marker.unlink(missing_ok=True)
                continue
            break
        raise StoreError(f"{self._refusal} ({self._read().partition(' ')[2] or 'it has just begun'})")

    def _content(self) -> bytes:
        return f"{self.token} process {os.getpid()} on {socket.gethostname()}, sign of life {self._n_beats}".encode()

    def _read(self) -> str:
        try:
            return self._marker.read_bytes().decode(errors="replace")[:300]
        except FileNotFoundError:
            return ""

    def _renew(self) -> None:
        while not self._stop.wait(_BEAT):
            with suppress(OSError):  # what cannot be reached now is told before the next shard
                if not self._is_own():
                    return
                self._n_beats += 1
                self._marker.write(self._content())

    def _is_own(self) -> bool:
        return self._read().startswith(self.token)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        with suppress(OSError):
            if self._is_own():
                self._marker.unlink(missing_ok=True)


def check_held(marker: RemotePath, token: str) -> None:
    """Raise StoreError where another writer has taken over."""
    try:
        own = marker.read_bytes().startswith(token.encode())
    except FileNotFoundError:
        own = False
    if not own:
        raise StoreError(f"store: {str(marker)!r} is another process's by now; nothing more is written here")
