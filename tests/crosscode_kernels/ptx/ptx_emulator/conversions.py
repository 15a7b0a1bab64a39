"""Conversions between types, and byte permutation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ptx_emulator.assembler import Action, Operands, maker
from ptx_emulator.program import Instruction
from ptx_emulator.values import DTYPES, N_LANES, Array, from_float32, packed, to_float32

if TYPE_CHECKING:
    from ptx_emulator.machine import Warp

FLOATS = ("f16", "bf16", "f32")


@maker("cvt")
def _convert(one: Instruction, operands: Operands) -> Action:
    to, of = one.types
    write = operands.target(one.operands[0])
    if to.endswith("x2"):  # the first operand becomes the high half
        high, low = operands.sources(one.operands[1:], "f32")
        kind = to[:-2]
        return lambda warp, mask: write(
            warp, packed(from_float32(low(warp), kind), from_float32(high(warp), kind)), mask
        )
    read = operands.source(one.operands[1], of)
    if of in FLOATS and to in FLOATS:
        return lambda warp, mask: write(warp, from_float32(to_float32(read(warp), of), to), mask)
    if of in FLOATS:
        return lambda warp, mask: write(warp, np.trunc(to_float32(read(warp), of)).astype(DTYPES[to]), mask)
    if to in FLOATS:
        return lambda warp, mask: write(warp, from_float32(read(warp).astype(np.float32), to), mask)
    return lambda warp, mask: write(warp, read(warp).astype(DTYPES[to]), mask)


@maker("prmt")
def _permute(one: Instruction, operands: Operands) -> Action:
    write = operands.target(one.operands[0])
    x, y, selectors = operands.sources(one.operands[1:], "b32")

    def run(warp: Warp, mask: Array) -> None:
        both = x(warp).astype(np.uint64) | (y(warp).astype(np.uint64) << np.uint64(32))
        out = np.zeros(N_LANES, np.uint32)
        for i in range(4):
            selector = (selectors(warp) >> np.uint32(4 * i)) & 15
            byte = (both >> ((selector & 7).astype(np.uint64) * np.uint64(8))) & np.uint64(255)
            sign = np.where(byte & np.uint64(128), 255, 0)
            out |= np.where(selector & 8, sign, byte).astype(np.uint32) << np.uint32(8 * i)
        write(warp, out, mask)

    return run
