"""A progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Protocol, Self, TypeVar

from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

_Masked = TypeVar("_Masked", bound="HasMask")
SECONDS_BETWEEN_LINES = 10.0
N_MARKS = 6


class HasMask(Protocol):
    """Sequences, and which of their tokens count."""

    @property
    def mask_HS(self) -> Tensor: ...


class Progress:
    """What is done of long work, at which rate, the time left (of a `total` that is known), and figures beside it.

    The rate is that of the last minute of plain lines: before the first step a run may fill its shuffle buffer.
    """

    def __init__(self, total: int | None, *, what: str = "train", unit: str = "step", enabled: bool = True):
        self.total, self.what, self.unit, self.enabled = total, what, unit, enabled
        self._bar: tqdm[Any] | None = None
        self._done: int | None = None
        self._last_line = 0.0
        self._stack = ExitStack()
        self._marks: deque[tuple[float, int]] = deque(maxlen=N_MARKS)

    def __enter__(self) -> Self:
        return self

    def start(self, done: int) -> None:
        """Begin to count where so much is done already."""
        self._begin(done)
        if self.enabled and self._bar is None and not self._is_whole(done):
            self._print("waiting for the first batch")

    def _begin(self, done: int) -> None:
        self._done, self._last_line = done, time.monotonic()
        if self.enabled and _is_terminal():
            scaled = self.unit != "step"
            self._bar = tqdm(
                total=self.total, initial=done, unit=self.unit, unit_scale=scaled, desc=self.what, dynamic_ncols=True
            )
            self._stack.callback(self._bar.close)
            self._stack.enter_context(logging_redirect_tqdm())

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def advance(self, metrics: dict[str, Any], also: Iterable[str] = ()) -> None:
        """One more is done, with these latest loss, FVU and L0, and figures of other names where there are some."""
        self._show((self._done or 0) + 1, lambda: _figures(metrics, also))

    def show(self, done: int, figures: str) -> None:
        """So much is done; begins to count where `start` was not called."""
        self._show(done, lambda: figures)

    def _show(self, done: int, figures: Callable[[], str]) -> None:
        if self._done is None:
            self._begin(done)
        self._done = done
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
            self._bar.set_postfix_str(figures(), refresh=False)
        elif self.enabled:
            now = time.monotonic()
            if not self._marks:
                self._marks.append((now, done))
            if now - self._last_line >= SECONDS_BETWEEN_LINES or self._is_whole(done):
                self._last_line = now
                self._print(f"{self._pace(now, done)}{figures()}")
                self._marks.append((now, done))

    def through(self, batches: Iterable[_Masked]) -> Iterator[_Masked]:
        """The same batches, the usable tokens of each counted as done when the next one is asked for."""
        for batch in batches:
            yield batch
            self.show((self._done or 0) + int(batch.mask_HS.sum()), "")

    @contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Say that something other than a step takes its time."""
        if self._bar is not None:
            self._bar.set_description(what)
        elif self.enabled and self._is_whole(self._done or 0):
            self._print(what)
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar.set_description(self.what)

    def _is_whole(self, done: int) -> bool:
        return self.total is not None and done >= self.total

    def _pace(self, now: float, done: int) -> str:
        """Rate and time left; nothing before a second step tells."""
        then, done_then = self._marks[0]
        if done == done_then or now <= then:
            return ""
        rate = (done - done_then) / (now - then)
        shown = f"{rate:.1f} {self.unit}s/s" if rate >= 1 else f"{1 / rate:.1f} s/{self.unit}"
        left = "" if self.total is None else f"{_duration(max(0, self.total - done) / rate)} left  "
        return f"{shown}  {left}"

    def _print(self, text: str) -> None:
        of_all = "" if self.total is None else f"/{self.total}"
        try:
            print(f"{self.unit} {self._done}{of_all}  {text}".rstrip(), file=sys.stderr, flush=True)
        except OSError:  # nobody reads it any more, which is no reason to stop
            self.enabled = False


@contextmanager
def at_work(what: str) -> Iterator[None]:
    """Within the block, which cannot count what it does, a line now and then says for how long it has been at work."""
    over, started = threading.Event(), time.monotonic()

    def say() -> None:
        while not over.wait(SECONDS_BETWEEN_LINES):
            with suppress(OSError, ValueError):  # nobody reads it
                print(f"{what}  {_duration(time.monotonic() - started)}", file=sys.stderr, flush=True)

    threading.Thread(target=say, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _is_terminal() -> bool:
    # A terminal that does not know its width cannot redraw a line.
    return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _figures(metrics: dict[str, Any], also: Iterable[str]) -> str:
    shown = {"loss": "{:.4g}", "fvu": "{:.4f}", "l0": "{:.1f}", **dict.fromkeys(sorted(also), "{:.4g}")}
    return "  ".join(f"{name} {form.format(metrics[name])}" for name, form in shown.items() if name in metrics)
