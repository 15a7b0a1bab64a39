"""The full training step of every backend (forward, loss, backward, clip, Adam) against L, k and B, and per scheme.

The step is that of `train_step.py`, which compares variants with more care (their own processes, in turns): its ratios
are the ones to quote. Here is how time and memory grow. All backends: fused Adam, PyTorch's own memory settings.

Axes: B tokens · I flattened input dims · O flattened output dims · L latents.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, replace

import pytest
import torch
from bare_step import Case, Step, make_params, peak_bytes, saved_bytes
from conftest import DTYPES
from crosscode_kernels import resolve_backend
from torch import Tensor

BASE = {
    "cpu": Case("topk", B=512, L=16384, k=32),
    "cuda": Case("topk", B=4096, I=4608, O=4608, L=32768, k=64),
    "quick": Case("topk", B=4, I=12, O=16, L=64, k=4),
}
SWEEPS = {
    "cpu": {"L": (4096, 8192, 32768), "k": (8, 64, 128), "B": (128, 256, 1024)},
    "cuda": {"L": (16384, 65536, 131072), "k": (16, 32, 128), "B": (1024, 2048, 8192)},
    "quick": {"L": (32,), "k": (2,), "B": (2,)},
}
SCHEMES = ("batch_topk", "groupmax", "jumprelu", "l1")
L0 = 60
"""Active latents of a trained JumpReLU or L1 model."""
N_BATCHES = 4


def cases(size: str) -> list[Case]:
    """The base, every point of every sweep, every scheme."""
    base = BASE[size]
    swept = [replace(base, **{axis: value}) for axis, values in SWEEPS[size].items() for value in values]
    dense = {"jumprelu", "l1"}
    schemes = [
        replace(base, scheme=name, l0=min(L0, base.B * base.L // 256) if name in dense else 0.0) for name in SCHEMES
    ]
    return [base, *swept, *schemes]


def build(case: Case, backend: str, device: str, dtype: torch.dtype) -> tuple[Step, list[tuple[Tensor, Tensor]]]:
    """A step, and batches to rotate."""
    generator = torch.Generator().manual_seed(1)
    batches = [
        (torch.randn(case.B, case.I, generator=generator), torch.randn(case.B, case.O, generator=generator))
        for _ in range(N_BATCHES)
    ]
    params = {
        name: tensor.detach().to(device, dtype).requires_grad_()
        for name, tensor in make_params(case, batches[0][0]).items()
    }
    optimizer = torch.optim.Adam(params.values(), 5e-5, fused=True)
    ops = resolve_backend(backend, device, dtype)  # type: ignore[arg-type]
    return Step(case, ops, params, optimizer), [tuple(t.to(device, dtype) for t in batch) for batch in batches]  # type: ignore[misc]


def memory(step: Step, batch: tuple[Tensor, Tensor], device: str) -> dict[str, float]:
    """MiB of a step: at its peak above parameters, gradients and moments; kept for backward."""
    saved = saved_bytes(step, *batch)
    if device != "cuda":
        return {"peak_mib": peak_bytes(step, *batch) / 2**20, "saved_mib": saved / 2**20}
    grads = sum(tensor.nbytes for tensor in step.params.values())
    step.optimizer.zero_grad(set_to_none=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step.run(*batch)
    peak = torch.cuda.max_memory_allocated() - before - grads
    return {"peak_mib": max(peak, 0) / 2**20, "saved_mib": saved / 2**20}


def _name(case: Case) -> str:
    return f"{case.scheme}-B{case.B}-L{case.L}-k{case.k}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    metafunc.parametrize("case", cases("quick" if metafunc.config.getoption("quick") else device), ids=_name)


def test_step(target: tuple[str, str, str], case: Case, measure: Callable[..., None]) -> None:
    backend, device, dtype = target
    step, batches = build(case, backend, device, DTYPES[dtype])
    turn = itertools.cycle(batches)
    step.run(*next(turn))
    facts = asdict(case) | memory(step, batches[0], device)
    measure(lambda: step.run(*next(turn)), n_rounds=5, **facts)
