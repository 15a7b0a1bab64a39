"""Launching: the interpreter switch, the device guard, empty grids, crosscoding positions of equal width.

Axes: X crosscoding positions · O flattened output dims.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import groupby
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from crosscode_kernels.triton_common.heuristics import warps_on


@triton.jit
def _probe_kernel():
    pass


INTERPRETED: bool = not isinstance(_probe_kernel, JITFunction)
"""Whether kernels run in the interpreter (`TRITON_INTERPRET=1`); fixed when Triton is imported."""


_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# What `benches/static_compile.py` compiles for, and CUDA devices after the first of these, which have all that it has.
_LOWEST_CAPABILITY, _ROCM_ARCHITECTURES = (8, 0), ("gfx942",)


def unavailable_reason(device: torch.device, dtype: torch.dtype) -> str:
    """Why these kernels cannot serve tensors of `dtype` on `device`; "" where they can."""
    if dtype not in _DTYPES:
        return f"dtype {dtype} is not float16, bfloat16 or float32"
    if device.type == "cuda":
        if INTERPRETED:
            return "kernels run in the interpreter here (TRITON_INTERPRET is set)"
        return _unsupported_gpu(device)
    if device.type == "cpu":
        return "" if INTERPRETED else "on the CPU kernels run in the interpreter only: set TRITON_INTERPRET=1"
    return f"device {device} is neither CUDA nor ROCm"


def _unsupported_gpu(device: torch.device) -> str:
    """Why the kernels do not run on this GPU; "" where they do."""
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA or ROCm device"
    if torch.version.hip is not None:
        architecture = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
        if architecture not in _ROCM_ARCHITECTURES:
            return (
                f"architecture {architecture} is not among those it is compiled for: {', '.join(_ROCM_ARCHITECTURES)}"
            )
        return ""
    capability, lowest = torch.cuda.get_device_capability(device), _LOWEST_CAPABILITY
    if capability < lowest:
        return "compute capability {}.{} is below {}.{}".format(*capability, *lowest)
    return ""


class Launch(NamedTuple):
    """One launch: what would be handed to Triton."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any]


_record: list[Launch] | None = None


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Within this context launches are listed, not run: with tensors on the `meta` device, the launches of any size."""
    global _record
    outer, _record = _record, []
    try:
        yield _record
    finally:
        _record = outer


reached: list[Tensor] = []
"""What the launch under way reads beside its arguments, at addresses relative to theirs: for whoever checks addresses."""


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, reaches: Sequence[Tensor] = (), **meta: Any) -> None:
    """Run `kernel` on the device of its first tensor; a grid without programs is no launch. `reaches`: see `reached`."""
    if 0 in grid:
        return
    if _record is not None:
        _record.append(Launch(kernel, grid, args, meta))
        return
    if torch.version.hip is not None:
        meta["num_warps"] = warps_on(meta["num_warps"], 64)
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    reached[:] = reaches
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*args, **meta)
    reached.clear()


class Run(NamedTuple):
    """`n_x` neighbouring positions of one width: positions `first_x ..`, columns `first_o ..`."""

    first_x: int
    n_x: int
    first_o: int
    width: int


def runs_of_equal_width(segments: Sequence[int]) -> list[Run]:
    """One launch serves a run; widths are nearly always all equal, so there is nearly always one."""
    runs: list[Run] = []
    first_x = first_o = 0
    for width, group in groupby(segments):
        n_x = len(list(group))
        runs.append(Run(first_x, n_x, first_o, width))
        first_x, first_o = first_x + n_x, first_o + n_x * width
    return runs
