"""Host memory for training on a CPU: keep freed buffers, and large pages.

glibc hands every buffer above 32 MiB back to the operating system when it is freed and gets it anew, page by page, when one is
next needed; and a matrix of 100 MiB is 25,000 pages of 4 KiB, so that gathers of rows miss the address cache. Gradients
and pre-activations are such buffers, in every step. Together these cost a fifth of a sparse training step.
"""

from __future__ import annotations

import ctypes
import os

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST = 2**31 - 1


def prepare_host_memory() -> bool:
    """Make this process keep freed buffers, and ask for huge pages for tensors of 2 MiB and more. For a program to call once,
    at its start; memory then stays at its peak until the process ends.

    Huge pages are PyTorch's own `THP_MEM_ALLOC_ENABLE`, which it reads when it makes its first CPU tensor: called later, this
    leaves pages as they are. False where the C library is not glibc; results never depend on it."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST)) and bool(mallopt(_M_TRIM_THRESHOLD, _LARGEST))
