"""Ctrl-C and SIGTERM: finish the step, save, leave; a second signal leaves at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Self

from crosscode.errors import Interrupted

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Stopped(BaseException):
    """A signal came within `interruptible`."""


class StopSignals:
    """Within the block, SIGINT, SIGTERM and SIGHUP set `received` instead of ending the process.

    A second signal has its usual effect at once. The handlers from before are put back at the end. Outside the main
    thread, where Python lets nobody install handlers, the block does nothing.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[signal.Signals, Any] = {}

        self.may_raise = False

    def interrupted(self, step: int, n_steps: int, command: str, also: str = "") -> Interrupted:
        """What to raise once all is saved."""
        return Interrupted(f"stopped by {self.received} after step {step} of {n_steps}{also}; continue with: {command}")

    def __enter__(self) -> Self:
        global _active
        if threading.current_thread() is threading.main_thread():
            # What is ignored stays so: `nohup` does that to SIGHUP.
            heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._first) for number in heard}
            _active = self
        return self

    def __exit__(self, *exc_info: object) -> None:
        global _active
        _active = None
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _first(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        for each in self._before:
            signal.signal(each, _leave_at_once)
        # Not through a logger or a stream: the signal may have come while one of these was at work.
        text = f"crosscode: {self.received}: finishing the step and saving; a second signal ends at once\n"
        with suppress(OSError):
            os.write(2, text.encode())
        if self.may_raise:
            raise Stopped


_active: StopSignals | None = None


@contextmanager
def interruptible() -> Iterator[None]:
    """Within the block, where nothing is lost when it is left anywhere, a signal that the running `StopSignals` hears
    raises `Stopped` at once."""
    stop = _active
    if stop is None:
        yield
        return
    if stop.received:
        raise Stopped
    stop.may_raise = True
    try:
        yield
    finally:
        stop.may_raise = False


def _leave_at_once(number: int, frame: FrameType | None) -> None:
    """End by the signal itself, so that a shell sees what it expects. A checkpoint half written is no checkpoint."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
