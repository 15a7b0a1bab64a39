"""Rows made ahead of their use, by a thread and a bounded queue.

The thread saves the source's position beside each item, so that the position of the stream is always that of what
was consumed, never of what was made.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Any

from crosscode.data.rows import Rows, RowSource, RowStream
from crosscode.errors import check_at_least

_POLL_SECONDS = 0.1


class PrefetchedRows:
    """Another row source, `depth` items ahead of its reader."""

    def __init__(self, rows: RowSource, depth: int) -> None:
        check_at_least(1, prefetch=depth)
        self.rows = rows
        self.depth = depth
        self.shuffled, self.dims, self.dtype, self.device = rows.shuffled, rows.dims, rows.dtype, rows.device
        self.open_sample, self.settings, self.scaling_MP = rows.open_sample, rows.settings, rows.scaling_MP

    def open(self, state: dict[str, Any] | None = None) -> RowStream:
        return _PrefetchStream(self.rows.open(state), self.depth)


class _PrefetchStream:
    """The queue holds (rows, position after them), an exception that ended the source, or None at its end."""

    def __init__(self, stream: RowStream, depth: int) -> None:
        self._stream = stream
        self._state = stream.state_dict()
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=depth)
        self._ended = False
        stop = threading.Event()
        self._thread = threading.Thread(target=_produce, args=(stream, self._queue, stop), daemon=True)
        self._thread.start()
        self._finalize = weakref.finalize(self, _stop, stop, self._thread)

    def __iter__(self) -> Iterator[Rows]:
        return self

    def __next__(self) -> Rows:
        if self._ended:
            raise StopIteration
        item = self._queue.get()
        if isinstance(item, tuple):
            rows, self._state = item
            return rows
        self._ended = True
        self.close()
        if isinstance(item, BaseException):
            raise item
        raise StopIteration

    def state_dict(self) -> dict[str, Any]:
        return self._state

    def close(self) -> None:
        self._finalize()
        self._stream.close()


def _produce(stream: RowStream, items: queue.Queue[Any], stop: threading.Event) -> None:
    item: Any = None
    while not stop.is_set():
        try:
            rows = next(stream, None)
            item = None if rows is None else (rows, stream.state_dict())
        except BaseException as error:
            item = error
        while not stop.is_set():
            try:
                items.put(item, timeout=_POLL_SECONDS)
                break
            except queue.Full:
                continue
        if not isinstance(item, tuple):
            return


def _stop(stop: threading.Event, thread: threading.Thread) -> None:
    """Ends the thread and waits for it: a thread that is still in native code at interpreter exit would crash."""
    stop.set()
    if thread is not threading.current_thread():
        thread.join()
