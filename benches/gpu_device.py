"""The device under test: its clock, its memory, its graphs; and a stand-in without any of it, for a dry run on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import cuda

from crosscode.trainers.graphs import CudaCapture


class Gpu:
    """A CUDA or ROCm device. Times are those of events on its stream."""

    device = "cuda"

    def name(self) -> str:
        return cuda.get_device_name()

    def facts(self) -> dict[str, Any]:
        properties = cuda.get_device_properties(0)
        return {
            "name": properties.name, "memory_gib": properties.total_memory / 2**30,
            "multiprocessors": properties.multi_processor_count, "capability": list(cuda.get_device_capability()),
            "cuda": torch.version.cuda, "hip": torch.version.hip,
        }  # fmt: skip

    def synchronize(self) -> None:
        cuda.synchronize()

    def milliseconds(self, call: Callable[[], Any], n_rounds: int = 7, n_calls: int = 10) -> list[float]:
        """Of one call, for each round of calls; after as many calls to warm up."""
        found = []
        for number in range(n_rounds + 1):
            start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
            start.record()
            for _ in range(n_calls):
                call()
            end.record()
            end.synchronize()
            if number:
                found.append(start.elapsed_time(end) / n_calls)
        return found

    def peak_mib(self, call: Callable[[], Any]) -> float:
        """Most memory in use during a call, above what was in use before."""
        cuda.synchronize()
        before = cuda.memory_allocated()
        cuda.reset_peak_memory_stats()
        call()
        cuda.synchronize()
        return (cuda.max_memory_allocated() - before) / 2**20

    @contextmanager
    def no_waiting(self) -> Iterator[None]:
        """Within this context it is an error to wait for the device."""
        cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            cuda.set_sync_debug_mode("default")

    def captured(self, step: Callable[[], Any], n_warm_up: int = 3) -> Callable[[], Any]:
        """A step as a graph; what replays it. Raises what the capture raises."""
        capture = self.capture()
        for _ in range(n_warm_up):
            capture.aside(step)
        return capture.capture(step)[1]

    def capture(self) -> Any:
        """As a trainer makes graphs."""
        return CudaCapture(torch.device(self.device))

    def free(self) -> None:
        cuda.empty_cache()


class DryRun(Gpu):
    """The same calls on CPU tensors, once each: does the program work? Its times mean nothing."""

    device = "cpu"

    def name(self) -> str:
        return "dry run"

    def facts(self) -> dict[str, Any]:
        return {"name": self.name()}

    def synchronize(self) -> None:
        pass

    def milliseconds(self, call: Callable[[], Any], n_rounds: int = 1, n_calls: int = 1) -> list[float]:
        start = time.perf_counter()
        call()
        return [1e3 * (time.perf_counter() - start)]

    def peak_mib(self, call: Callable[[], Any]) -> float:
        call()
        return 0.0

    @contextmanager
    def no_waiting(self) -> Iterator[None]:
        yield

    def capture(self) -> Any:
        return _Repeats()

    def free(self) -> None:
        pass


class _Repeats:
    """In place of graphs: a replay runs the program once more."""

    def aside(self, call: Callable[[], Any]) -> Any:
        return call()

    def capture(self, call: Callable[[], Any]) -> tuple[None, Callable[[], Any]]:
        return None, call


def median_ms(gpu: Gpu, call: Callable[[], Any]) -> dict[str, float]:
    """`ms` and its quartiles, of a call."""
    found = gpu.milliseconds(call)
    first, _, third = statistics.quantiles(found, n=4) if len(found) > 1 else (found[0],) * 3
    return {"ms": statistics.median(found), "first_quartile_ms": first, "third_quartile_ms": third}
