"""A progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Self

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

SECONDS_BETWEEN_LINES = 10.0
N_MARKS = 6


class Progress:
    """Steps done, rate, time left, and the latest loss, FVU and L0.

    The rate is that of the last minute of plain lines: before the first step a run may fill its shuffle buffer.
    """

    def __init__(self, n_steps: int, *, enabled: bool = True):
        self.n_steps, self.enabled = n_steps, enabled
        self._bar: tqdm[Any] | None = None
        self._done = 0
        self._last_line = 0.0
        self._stack = ExitStack()
        self._marks: deque[tuple[float, int]] = deque(maxlen=N_MARKS)

    def __enter__(self) -> Self:
        return self

    def start(self, step: int) -> None:
        """Begin to count, at a step that is done already."""
        self._done, self._last_line = step, time.monotonic()
        if self.enabled and _is_terminal():
            self._bar = tqdm(total=self.n_steps, initial=step, unit="step", desc="train", dynamic_ncols=True)
            self._stack.callback(self._bar.close)
            self._stack.enter_context(logging_redirect_tqdm())
        elif self.enabled and step < self.n_steps:
            _print(f"step {step}/{self.n_steps}  waiting for the first batch")

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def advance(self, metrics: dict[str, Any]) -> None:
        self._done += 1
        if self._bar is not None:
            self._bar.update()
            self._bar.set_postfix_str(_figures(metrics), refresh=False)
        elif self.enabled:
            now = time.monotonic()
            if not self._marks:
                self._marks.append((now, self._done))
            if now - self._last_line >= SECONDS_BETWEEN_LINES or self._done == self.n_steps:
                self._last_line = now
                _print(f"step {self._done}/{self.n_steps}  {self._pace(now)}{_figures(metrics)}")
                self._marks.append((now, self._done))

    @contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Say that something other than a step takes its time."""
        if self._bar is not None:
            self._bar.set_description(what)
        elif self.enabled and self._done == self.n_steps:
            _print(f"step {self._done}/{self.n_steps}  {what}")
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar.set_description("train")

    def _pace(self, now: float) -> str:
        """Rate and time left; nothing before a second step tells."""
        then, done = self._marks[0]
        if self._done == done or now <= then:
            return ""
        rate = (self._done - done) / (now - then)
        shown = f"{rate:.1f} steps/s" if rate >= 1 else f"{1 / rate:.1f} s/step"
        return f"{shown}  {_duration((self.n_steps - self._done) / rate)} left  "


def _is_terminal() -> bool:
    # A terminal that does not know its width cannot redraw a line.
    return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0


def _print(line: str) -> None:
    print(line.rstrip(), file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _figures(metrics: dict[str, Any]) -> str:
    shown = {"loss": "{:.4g}", "fvu": "{:.4f}", "l0": "{:.1f}"}
    return "  ".join(f"{name} {form.format(metrics[name])}" for name, form in shown.items() if name in metrics)
