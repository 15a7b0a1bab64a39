"""What the pytest benches share: sizes, backends and devices, the clock of a GPU, facts about the machine.

    pytest -c benches/pytest.ini benches [--quick] [--threads 2] [--benchmark-json FILE]

On a GPU a round is timed between two CUDA events, with several calls of rotated inputs in it; on the CPU a round is one
call on pytest-benchmark's clock. `--quick` runs everything once at toy sizes.
"""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from crosscode_kernels import available_backends

sys.path.insert(0, str(Path(__file__).parent))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="toy sizes, one round: do the benches work?")
    parser.addoption("--threads", type=int, default=2, help="threads of PyTorch on the CPU")


def targets() -> list[tuple[str, str, str]]:
    """(backend, device, dtype) that work here. Triton on the CPU is its interpreter: it is run, its times mean nothing."""
    found = [("cpu", "float32")]
    if torch.cuda.is_available():
        found = [("cuda", "float32"), ("cuda", "bfloat16")]
    return [
        (status.name, device, dtype)
        for device, dtype in found
        for status in available_backends(device, DTYPES[dtype])
        if status.available
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "target" in metafunc.fixturenames:
        metafunc.parametrize("target", targets(), ids="-".join)


def cuda_clock() -> Callable[[], float]:
    """A clock in seconds of the GPU's own time: an event on the stream, waited for."""
    origin = torch.cuda.Event(enable_timing=True)
    origin.record()

    def now() -> float:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        return origin.elapsed_time(event) / 1e3

    return now


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    torch.set_num_threads(config.getoption("--threads"))
    clock = cuda_clock() if torch.cuda.is_available() and not config.getoption("collectonly") else None
    for item in items:
        target = getattr(item, "callspec", None) and item.callspec.params.get("target")  # pyright: ignore
        if target and target[1] == "cuda":
            item.add_marker(pytest.mark.benchmark(timer=clock))


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--quick"))


@pytest.fixture
def measure(benchmark: Any, quick: bool, target: tuple[str, str, str]) -> Iterator[Callable[..., None]]:
    """`measure(call, n_rounds, **facts)`: times `call()` and stores facts with the result."""

    def run(call: Callable[[], Any], n_rounds: int = 5, **facts: Any) -> None:
        backend, device, dtype = target
        benchmark.extra_info.update(facts | {"backend": backend, "device": device, "dtype": dtype})
        calls = 10 if device == "cuda" and not quick else 1
        warm_up = 0 if quick else 1
        rounds = 1 if quick else n_rounds * (4 if device == "cuda" else 1)
        benchmark.pedantic(call, rounds=rounds, iterations=calls, warmup_rounds=warm_up)

    yield run


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info |= {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": config.getoption("--threads"),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "interpreted": os.environ.get("TRITON_INTERPRET") == "1",
        "quick": config.getoption("--quick"),
    }
    try:
        import triton

        machine_info["triton"] = triton.__version__
    except ImportError:
        machine_info["triton"] = None
