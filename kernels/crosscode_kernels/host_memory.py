"""Keeping the memory of large CPU tensors between steps.

glibc hands every buffer above 32 MiB back to the operating system when it is freed and gets it anew, page by page, when one is
next needed: a tenth or more of a training step on a CPU, for gradients and pre-activations alike. Huge pages (PyTorch's
`THP_MEM_ALLOC_ENABLE`) are left as the user has them: they made some steps a little faster and others, by where
buffers came to lie, twice as slow.
"""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST = 2**31 - 1


def prepare_host_memory() -> bool:
    """Make this process keep freed buffers for the next tensors. For a program to call once, at its start; memory then stays
    at its peak until the process ends. False where the C library is not glibc; results never depend on it."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST)) and bool(mallopt(_M_TRIM_THRESHOLD, _LARGEST))
