"""Ctrl-C, SIGTERM and SIGHUP: finish the step, save, leave; a second signal leaves at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn, Self

from crosscode.errors import Interrupted

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def n_ranks() -> int:
    """How many processes `torchrun` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process speaks for all: the only one, or rank 0."""
    return os.environ.get("RANK", "0") == "0" or n_ranks() == 1


class Stopped(BaseException):
    """A signal came within `interruptible`. Where it leaves the block of `StopSignals`, nothing was there to save: the
    signal then has its usual effect."""


class StopSignals:
    """Within the block, SIGINT, SIGTERM and SIGHUP set `received` instead of ending the process.

    A second signal has its usual effect at once. The handlers from before are put back at the end. Outside the main
    thread, where Python lets nobody install handlers, the block does nothing.
    """

    def __init__(self) -> None:
        self._received: str | None = None
        self._pending: str | None = None
        self._before: dict[signal.Signals, Any] = {}
        self.may_raise = False

    @property
    def received(self) -> str | None:
        """Name of the signal that came; in other threads the one that came in the main thread."""
        return self._received or (_active._received if _active else None)

    def interrupted(self, step: int, n_steps: int, command: str, also: str = "") -> Interrupted:
        """What to raise once all is saved."""
        error = Interrupted(
            f"stopped by {self.received} after step {step} of {n_steps}{also}; continue with: {command}"
        )
        error.signal = self.received
        return error

    def __enter__(self) -> Self:
        global _active
        if threading.current_thread() is threading.main_thread():
            # What is ignored stays so: `nohup` does that to SIGHUP.
            heard = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._first) for number in heard}
            _active = self
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc_info: object) -> None:
        global _active
        if _active is self:
            _active = None
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        if kind is Stopped and self._received:
            signal.raise_signal(signal.Signals[self._received])

    def _first(self, number: int, frame: FrameType | None) -> None:
        name = self._pending = signal.Signals(number).name
        if not _agreed_on:
            self._received = name
        for each in self._before:
            signal.signal(each, _leave_at_once)
        # Not through a logger or a stream: the signal may have come while one of these was at work.
        text = f"crosscode: {name}: finishing the step and saving; a second signal ends at once\n"
        with suppress(OSError):
            if is_first():
                os.write(2, text.encode())
        if self.may_raise and not _agreed_on:
            raise Stopped


_active: StopSignals | None = None
_agreed_on = False


def stop_by_agreement() -> None:
    """From now on a signal is only `pending` until `stop_all`: for processes that must stop at one place."""
    global _agreed_on
    _agreed_on = True


def pending() -> str | None:
    """Name of a signal that waits for agreement."""
    return _active._pending if _active else None


def stop_all(name: str) -> NoReturn:
    """What a signal `name` would have done here, where it came to another process or was agreed on."""
    if _active is not None:
        _active._received = name
    raise Stopped


@contextmanager
def interruptible() -> Iterator[None]:
    """Within the block, where nothing is lost when it is left anywhere, a signal that the running `StopSignals` hears
    raises `Stopped` at once. In threads that hear no signals it is raised at the beginning of the block."""
    check_not_stopped()
    with _raising(True):
        yield


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Within the block, a part of `interruptible` that must end as a whole, `Stopped` waits for the end."""
    with _raising(False):
        yield
    if _active is not None and _active.may_raise:
        check_not_stopped()


def check_not_stopped() -> None:
    """Raise `Stopped` if a signal came."""
    if _active is not None and _active.received:
        raise Stopped


@contextmanager
def _raising(may_raise: bool) -> Iterator[None]:
    stop = _active
    if stop is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = stop.may_raise
    try:
        stop.may_raise = may_raise
        yield
    finally:
        stop.may_raise = before


def _leave_at_once(number: int, frame: FrameType | None) -> None:
    """End by the signal itself, so that a shell sees what it expects. A checkpoint half written is no checkpoint."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
