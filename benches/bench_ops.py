"""Every op of every backend at a real size, forward, and forward with backward.

Latents are those of the bench's training step: a few of them popular, as in a trained model. On a GPU, calls rotate over
batches that together exceed its cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from bare_step import Case
from conftest import DTYPES
from crosscode_kernels import resolve_backend
from op_cases import OPS, Inputs, call

SIZES = {
    "cpu": Case("topk"),
    "cuda": Case("topk", B=4096, I=4608, O=4608, L=16384, k=64),
    "quick": Case("topk", B=4, I=12, O=16, L=64, k=4),
}
N_ROTATED = {"cpu": 1, "cuda": 4}
"""Batches in turn. On the CPU the weights alone exceed the caches."""


@lru_cache(maxsize=1)
def _inputs(backend: str, device: str, dtype: str, size: str) -> list[Inputs]:
    ops = resolve_backend(backend, device, DTYPES[dtype])  # type: ignore[arg-type]
    return [Inputs(SIZES[size], ops, device, DTYPES[dtype], seed) for seed in range(N_ROTATED[device])]


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("name", OPS)
def test_op(target: tuple[str, str, str], name: str, direction: str, quick: bool, measure: Callable[..., None]) -> None:
    backend, device, dtype = target
    op, backward = OPS[name], direction != "forward"
    if backward and not op.leaves:
        pytest.skip("for inference")
    size = "quick" if quick else device
    batches = itertools.cycle(_inputs(backend, device, dtype, size))
    ops = resolve_backend(backend, device, DTYPES[dtype])  # type: ignore[arg-type]
    case = SIZES[size]
    facts = {"op": name, "direction": direction, "B": case.B, "I": case.I, "O": case.O, "L": case.L, "k": case.k}
    measure(lambda: call(op, ops, next(batches), backward), n_rounds=3, **facts)
    if device == "cuda":
        torch.cuda.synchronize()
