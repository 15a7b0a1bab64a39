"""Kernel launches on CPU tensors, compiled for sm_90 and emulated."""

from __future__ import annotations

import ctypes
import random
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from crosscode_kernels.triton_common.launch import reached
from static_compile import compiled_job, specialised
from torch import Tensor
from triton.runtime.jit import JITFunction

from ptx_emulator import arithmetic, conversions, exchange, transfers  # noqa: F401  (they add the makers of instructions)
from ptx_emulator.assembler import assemble
from ptx_emulator.machine import Index, Kernel, run_grid
from ptx_emulator.memory import Region, Space
from ptx_emulator.program import parse
from ptx_emulator.values import Array

TARGET = "sm_90"


class Emulator:
    """Runs launches and keeps what was found wrong, by kernel, in `findings`. `change_ptx` rewrites a kernel's PTX first (to
    break it on purpose); of a grid at most `most_programs` run, drawn at random."""

    def __init__(
        self, seed: int = 0, most_programs: int | None = None, change_ptx: Callable[[str], str] = lambda ptx: ptx
    ) -> None:
        self.chance, self.most_programs, self.change_ptx = random.Random(seed), most_programs, change_ptx
        self.findings: Counter[str] = Counter()
        self.programs: Counter[str] = Counter()
        self.written: dict[int, Array] = {}
        """Which bytes the last launch wrote, by the address of their tensor."""
        self._kernels: dict[Any, Kernel] = {}

    @contextmanager
    def in_place_of_a_gpu(self) -> Iterator[Emulator]:
        """Within this context Triton's kernels run here."""

        def run(kernel: JITFunction[Any], *args: Any, grid: tuple[int, ...], warmup: bool = False, **meta: Any) -> None:
            self.launch(kernel, grid, args, meta)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(JITFunction, "run", run)
            yield self

    def launch(
        self, kernel: JITFunction[Any], grid: tuple[int, ...], args: tuple[Any, ...], meta: dict[str, Any]
    ) -> None:
        job = specialised(kernel, args, meta, "")
        if job not in self._kernels:
            compiled = compiled_job(job, TARGET)
            program = parse(self.change_ptx(compiled.asm["ptx"]), compiled.metadata.shared, job.num_warps)
            self._kernels[job] = Kernel(program, assemble(program))
        runnable, constants = self._kernels[job], {name for name, kind in job.signature if kind == "constexpr"}
        by_name = dict(zip(kernel.arg_names, args, strict=False)) | meta
        values = [by_name[name] for name, _ in job.signature if name not in constants]
        names = list(runnable.program.params)
        params = dict.fromkeys(names, 0) | dict(zip(names, map(_bits, values), strict=False))
        memory = Space("global", _regions([*(value for value in values if isinstance(value, Tensor)), *reached]))
        columns, rows, layers = (*grid, 1, 1)[:3]
        size: Index = (columns, rows, layers)
        indices = [(x, y, z) for z in range(layers) for y in range(rows) for x in range(columns)]
        self.chance.shuffle(indices)
        indices = indices[: self.most_programs]
        self.programs[job.kernel] += len(indices)
        for text, count in run_grid(runnable, size, indices, params, memory, self.chance).items():
            self.findings[f"{job.kernel}: {text}"] += count
        self.written = {region.start: region.writer != 0 for region in memory.regions}


def _bits(value: Any) -> int:
    """An argument as a kernel's parameter."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    if isinstance(value, float):
        return struct.unpack("<I", struct.pack("<f", value))[0]
    return int(value)


def _regions(tensors: list[Tensor]) -> list[Region]:
    """The memory of the tensors; of those that begin at one place, the longest."""
    sizes: dict[int, int] = {}
    for tensor in tensors:
        assert tensor.is_contiguous() or tensor.T.is_contiguous()
        sizes[tensor.data_ptr()] = max(tensor.nbytes, sizes.get(tensor.data_ptr(), 0))
    return [
        Region(start, np.ctypeslib.as_array((ctypes.c_uint8 * n_bytes).from_address(start)))
        for start, n_bytes in sorted(sizes.items())
        if n_bytes
    ]
