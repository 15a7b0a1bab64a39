"""In which numbers a step computes. Weights, optimizer, thresholds and statistics are float32 whatever is chosen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Literal

import torch


def autocast(precision: Literal["float32", "bfloat16"], device: torch.device) -> AbstractContextManager[object]:
    """Around forward and loss: bfloat16 runs their matrix products in it, with float32 master weights."""
    if device.type == "meta":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16")


def float32_products(*, tf32: bool) -> AbstractContextManager[None]:
    """Around a whole run: with `tf32`, float32 products may round their factors to 10 bits of mantissa, on devices that
    have such products."""
    return _matmul_precision("high" if tf32 else "highest")


@contextmanager
def full_precision() -> Iterator[None]:
    """Within the block float32 is float32, whatever a run around it has chosen: no autocast, no TF32."""
    with ExitStack() as stack:
        for device_type in ("cpu", "cuda", "mps"):
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        stack.enter_context(_matmul_precision("highest"))
        yield


@contextmanager
def _matmul_precision(name: str) -> Iterator[None]:
    # PyTorch has two settings. Writing the older one sets the newer (`fp32_precision`, from 2.9 on) too; reading the older
    # one raises where the newer was written otherwise.
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:
        before = None
    backends = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    newer = [(backend, backend.fp32_precision) for backend in backends if hasattr(backend, "fp32_precision")]
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        if before is not None:
            torch.set_float32_matmul_precision(before)
        for backend, precision in newer:
            backend.fp32_precision = precision
