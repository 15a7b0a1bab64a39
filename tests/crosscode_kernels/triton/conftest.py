"""The Triton kernels in the interpreter. It is chosen when Triton is imported: these tests need their own process.

    TRITON_INTERPRET=1 pytest tests/crosscode_kernels/triton        (`make tests` does so)

Without the variable nothing is collected here.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

BENCHES = Path(__file__).parents[3] / "benches"
interpreted = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if interpreted else ["test_*.py"]


def pytest_report_header() -> str:
    return "triton: interpreted" if interpreted else "triton: kernel tests need TRITON_INTERPRET=1, not collected"


def _bench_module(name: str) -> ModuleType:
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, BENCHES / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture(scope="session")
def static_tensors() -> ModuleType:
    return _bench_module("static_tensors")


@pytest.fixture(scope="session")
def static_cases(static_tensors: ModuleType) -> ModuleType:
    return _bench_module("static_cases")


@pytest.fixture(scope="session")
def traffic_model(static_tensors: ModuleType) -> ModuleType:
    _bench_module("sass")
    return _bench_module("traffic_model")


@pytest.fixture(scope="session")
def static_traffic(traffic_model: ModuleType) -> ModuleType:
    _bench_module("step_model")
    return _bench_module("static_traffic")


@pytest.fixture(scope="session")
def counted_bytes(traffic_model: ModuleType) -> ModuleType:
    return _bench_module("counted_bytes")


def tensors_in(result: Any) -> list[Tensor]:
    """The tensors of a kernel's result."""
    return [result] if isinstance(result, Tensor) else [item for item in result if isinstance(item, Tensor)]


@pytest.fixture
def same_bits() -> Callable[[Any, Any], None]:
    """Asserts that two results agree to the bit."""

    def check(one: Any, other: Any) -> None:
        pairs = list(zip(tensors_in(one), tensors_in(other), strict=True))
        assert pairs
        for first, second in pairs:
            assert first.dtype == second.dtype and first.shape == second.shape
            bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[first.element_size()]
            assert torch.equal(first.contiguous().view(bits), second.contiguous().view(bits))

    return check
