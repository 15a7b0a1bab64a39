"""Large CPU tensors in memory that is used again.

The C library hands every large buffer back to the operating system when it is freed, and the next one is a new buffer whose
pages the system clears and maps one by one: a quarter of a sparse training step on a CPU, for pre-activations and weight
gradients alike. Here a block of memory stays, and is handed out again once no tensor uses it.

A lease is the object through which a tensor holds its block; PyTorch keeps it as long as any tensor, view or saved
tensor shares the storage. A block whose lease is gone is free.
"""

from __future__ import annotations

import ctypes
import math
import sys
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SMALLEST_BYTES = 4 << 20
"""Smaller tensors stay with the C library, which keeps their memory itself."""
_GIVEN_UP_AFTER = 64
"""Requests that a free block is kept for without being used: some ten training steps."""
_ROOM = 1 << 30
"""Bytes that the system must have left beside a new block, or the free ones are given back first."""


class _Block:
    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = n_bytes
        self.memory: Any = torch.empty(n_bytes, dtype=torch.uint8).numpy()
        self.lease: weakref.ref[Any] | None = None
        self.last_request = 0

    def is_free(self) -> bool:
        return self.lease is None or self.lease() is None

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        lease = (ctypes.c_char * self.n_bytes).from_buffer(self.memory)
        self.lease = weakref.ref(lease)
        # Not a view, which would hold its base, and PyTorch adds gradients in place only to what nothing else holds.
        return torch.frombuffer(lease, dtype=dtype, count=math.prod(shape)).resize_(tuple(shape))


class HostBuffers:
    """Blocks of a process, safe to use from several threads. A block that nothing has asked for over `_GIVEN_UP_AFTER`
    requests goes back to the system, and all that are free do where memory gets short."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: list[_Block] = []
        self._n_requests = 0

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous CPU tensor with whatever its memory last held."""
        n_bytes = _block_bytes(math.prod(shape) * dtype.itemsize)
        with self._lock:
            self._n_requests += 1
            block = self._free_block(n_bytes)
            block.last_request = self._n_requests
            return block.tensor(shape, dtype)

    def clear(self) -> None:
        """Give up every block. Tensors that use one keep it until they are gone."""
        with self._lock:
            self._blocks.clear()

    def n_bytes(self) -> int:
        """Bytes in blocks, used and free."""
        with self._lock:
            return sum(block.n_bytes for block in self._blocks)

    def _free_block(self, n_bytes: int) -> _Block:
        oldest = self._n_requests - _GIVEN_UP_AFTER
        self._blocks = [block for block in self._blocks if block.last_request >= oldest or not block.is_free()]
        for block in self._blocks:
            if block.n_bytes == n_bytes and block.is_free():
                return block
        if available_bytes() < n_bytes + _ROOM:
            self._give_back()
        try:
            block = _Block(n_bytes)
        except RuntimeError:  # the system refuses
            self._give_back()
            block = _Block(n_bytes)
        self._blocks.append(block)
        return block

    def _give_back(self) -> None:
        self._blocks = [block for block in self._blocks if not block.is_free()]


def available_bytes() -> int:
    """What the system says it can still give without swapping; where it does not say, no end of it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return sys.maxsize


def _block_bytes(n_bytes: int) -> int:
    """Up to an eighth more, so that tensors of nearly one size share blocks. What is not touched costs no memory."""
    step = 1 << max(n_bytes.bit_length() - 4, 12)
    return -(-n_bytes // step) * step


_buffers = HostBuffers()


def empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor on the device of `like`, of its dtype unless another is named; from a kept block where it is
    large and on the CPU. For the bodies of ops: what the shape is must be known, and nothing may be traced."""
    dtype = dtype or like.dtype
    if like.device.type != "cpu" or math.prod(shape) * dtype.itemsize < _SMALLEST_BYTES:
        return like.new_empty(shape, dtype=dtype)
    return _buffers.empty(shape, dtype)


def empty_like(tensor: Tensor) -> Tensor:
    """`empty` with the shape of `tensor`, contiguous."""
    return empty(tensor.shape, tensor)


def clear() -> None:
    """Give the kept memory of this process back as far as no tensor uses it."""
    _buffers.clear()


def n_bytes() -> int:
    """Bytes in blocks of this process, used and free."""
    return _buffers.n_bytes()
