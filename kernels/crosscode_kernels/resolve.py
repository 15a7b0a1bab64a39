"""The rule that picks a backend: an explicit request is served or refused, `auto` takes the fastest and says so."""

from __future__ import annotations

import importlib
import logging
from typing import NamedTuple, get_args

import torch

from crosscode_kernels.checks import FLOATS
from crosscode_kernels.opset import BackendName, OpSet

_logger = logging.getLogger("crosscode_kernels")
_CLASSES = {"triton": "TritonOpSet", "torch": "TorchOpSet", "reference": "ReferenceOpSet"}
_FASTEST_FIRST = tuple(_CLASSES)
_announced: set[tuple[str, str, torch.dtype]] = set()


class BackendStatus(NamedTuple):
    """Whether `name` works here; `reason` says why not ("" where it does)."""

    name: str
    available: bool
    reason: str


def _unavailable_reason(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why backend `name` cannot serve this device and dtype; "" where it can."""
    if dtype not in FLOATS:
        return f"dtype {dtype} is not float16, bfloat16, float32 or float64"
    name, _, options = name.partition(":")
    if "screened" in options and (device.type != "cpu" or dtype != torch.float32):
        return "screened encoding is for float32 on the CPU"
    if name != "triton":
        return ""
    try:
        triton_backend = importlib.import_module("crosscode_kernels.backends.triton")
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return triton_backend.unavailable_reason(device, dtype) or ""


def _op_set(name: str) -> OpSet:
    name, _, options = name.partition(":")
    cls = getattr(importlib.import_module(f"crosscode_kernels.backends.{name}"), _CLASSES[name])
    return cls(screened_encode="screened" in options, row_sparse_grads="rows" in options) if options else cls()


def available_backends(
    device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> list[BackendStatus]:
    """Every backend, fastest first, with the reason where one is not available on `device` (default: the accelerator
    if there is one, else the CPU)."""
    device = torch.device(device) if device is not None else _default_device()
    reasons = {name: _unavailable_reason(name, device, dtype) for name in _FASTEST_FIRST}
    return [BackendStatus(name, not reason, reason) for name, reason in reasons.items()]


def _default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_backend(name: BackendName, device: torch.device | str, dtype: torch.dtype = torch.float32) -> OpSet:
    """The op set for `name`. `auto` picks the fastest that supports device and dtype and logs the choice once.

    Raises ValueError for an unknown name, and for a backend that was asked for by name and cannot serve the request.
    """
    device = torch.device(device)
    if name not in get_args(BackendName):
        raise ValueError(f"backend is {name!r}; must be one of {', '.join(get_args(BackendName))}")
    if name != "auto":
        if reason := _unavailable_reason(name, device, dtype):
            raise ValueError(f"backend {name!r} is not available on {device} with {dtype}: {reason}")
        return _op_set(name)
    refused: list[str] = []
    for candidate in _FASTEST_FIRST:
        reason = _unavailable_reason(candidate, device, dtype)
        if not reason and candidate == "triton" and device.type == "cpu":
            reason = "its interpreter is for tests"
        if not reason:
            break
        refused.append(f"{candidate}: {reason}")
    else:
        raise ValueError(f"no backend serves {device} with {dtype}: {'; '.join(refused)}")
    if (candidate, str(device), dtype) not in _announced:
        _announced.add((candidate, str(device), dtype))
        why = "; ".join(refused) or f"the fastest, and its kernels serve {torch.cuda.get_device_name(device)}"
        _logger.info("backend auto: %s on %s with %s (%s)", candidate, device, dtype, why)
    return _op_set(candidate)
