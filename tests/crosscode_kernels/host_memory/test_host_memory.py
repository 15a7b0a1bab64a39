"""Host memory is prepared by a program, in its own process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
from crosscode_kernels.host_memory import prepare_host_memory
assert prepare_host_memory()
import resource, torch
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(1 << 24).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(not Path("/proc").exists(), reason="glibc only")
def test_freed_buffers_are_used_again():
    """A tensor of 64 MiB, filled for the second time, is 16384 new pages where its memory went back."""
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 100
