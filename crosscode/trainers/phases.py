"""The parts of a step: how long each takes, and what to set lower where memory runs out."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from crosscode.errors import CrosscodeError

Phase = Literal["harvest", "step", "eval"]
ADVICE: dict[Phase, str] = {
    "harvest": "lower data.harvest_batch_size or data.shuffle_buffer_size",
    "step": "raise train.grad_accumulation, lower train.batch_size, or set train.precision: bfloat16",
    "eval": "lower data.harvest_batch_size",
}


class OutOfMemory(CrosscodeError):
    """Memory ran out; says which setting to change."""


class Phases:
    """Seconds spent in each part, since the start and since the last `take_means`.

    On a CUDA device, work is timed by events on its stream, which are read when the means are taken: nothing waits
    in between.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.total_s: dict[Phase, float] = {"harvest": 0.0, "step": 0.0, "eval": 0.0}
        self.training_s_before = 0.0
        self._count: dict[Phase, int] = {}
        self._seconds: dict[Phase, float] = {}
        self._events: dict[Phase, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {}

    @contextmanager
    def __call__(self, phase: Phase) -> Iterator[None]:
        events = self._start_event()
        started = time.perf_counter()
        try:
            yield
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise OutOfMemory(f"out of memory in the {phase} part of a step: {ADVICE[phase]} ({reason})") from error
        seconds = time.perf_counter() - started
        self.total_s[phase] += seconds
        self._count[phase] = self._count.get(phase, 0) + 1
        if events is None:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds
        else:
            events[1].record()
            self._events.setdefault(phase, []).append(events)

    @property
    def training_s(self) -> float:
        """Seconds of training steps and of their activations, with those of the parts of the run before a resume."""
        return self.training_s_before + self.total_s["harvest"] + self.total_s["step"]

    def take_means(self) -> dict[str, float]:
        """`time/<phase>_ms`: mean duration since the last call. Waits for the device."""
        if self._events:
            torch.cuda.synchronize(self.device)
        for phase, pairs in self._events.items():
            self._seconds[phase] = sum(start.elapsed_time(end) for start, end in pairs) / 1e3
        means = {f"time/{phase}_ms": 1e3 * self._seconds[phase] / n for phase, n in self._count.items()}
        self._count, self._seconds, self._events = {}, {}, {}
        return means

    def _start_event(self) -> tuple[torch.cuda.Event, torch.cuda.Event] | None:
        if self.device.type != "cuda":
            return None
        pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        pair[0].record()
        return pair


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out; the CPU's allocator raises a plain RuntimeError."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return "can't allocate memory" in str(error) or "out of memory" in str(error)


def peak_memory_gib(device: torch.device) -> dict[str, float]:
    """`memory/*`: largest size of the process, and of the device's allocations, so far. GiB."""
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    sizes = {"memory/process_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
    if device.type == "cuda":
        sizes["memory/device_peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
    return sizes
