"""Instructions with which the lanes of a warp exchange values. The machine has them wait for each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ptx_emulator.assembler import Action, Operands, Unsupported, maker, vector
from ptx_emulator.program import Instruction
from ptx_emulator.values import DTYPES, LANES, N_LANES, Array

if TYPE_CHECKING:
    from ptx_emulator.machine import Warp

REDUCE = {"add": np.add, "min": np.minimum, "max": np.maximum, "or": np.bitwise_or, "and": np.bitwise_and}


@maker("shfl")
def _shuffle(one: Instruction, operands: Operands) -> Action:
    mode, names = one.opcode[2], one.operands[0].split("|")
    writes = [operands.target(name) for name in names]
    value, by, clamp = operands.sources(one.operands[1:4], "b32")

    def run(warp: Warp, mask: Array) -> None:
        warp.check_all_lanes(mask, one.text)
        n, segment, bound = by(warp).astype(int) & 31, clamp(warp).astype(int) >> 8 & 31, clamp(warp).astype(int) & 31
        last, first = (LANES & segment) | (bound & ~segment), LANES & segment
        lane = {"bfly": LANES ^ n, "up": LANES - n, "down": LANES + n, "idx": first | (n & ~segment)}[mode]
        inside = lane >= last if mode == "up" else lane <= last
        writes[0](warp, value(warp)[np.where(inside, lane, LANES)], mask)
        if len(writes) > 1:
            writes[1](warp, inside, mask)

    return run


@maker("redux")
def _reduce(one: Instruction, operands: Operands) -> Action:
    dtype = DTYPES[one.types[-1]]
    write, value = operands.target(one.operands[0]), operands.source(one.operands[1], one.types[-1])
    reduce = REDUCE[one.opcode[2]].reduce

    def run(warp: Warp, mask: Array) -> None:
        warp.check_all_lanes(mask, one.text)
        write(warp, np.full(N_LANES, reduce(value(warp)[mask], dtype=dtype)), mask)

    return run


@maker("vote")
def _vote(one: Instruction, operands: Operands) -> Action:
    if "ballot" not in one.opcode:
        raise Unsupported(one.text)
    write, said = operands.target(one.operands[0]), operands.source(one.operands[1], "pred")

    def run(warp: Warp, mask: Array) -> None:
        warp.check_all_lanes(mask, one.text)
        ballot = np.bitwise_or.reduce(np.uint32(1) << LANES[said(warp) & mask].astype(np.uint32), initial=np.uint32(0))
        write(warp, np.full(N_LANES, ballot, np.uint32), mask)

    return run


@maker("ldmatrix", "stmatrix")
def _matrices(one: Instruction, operands: Operands) -> Action:
    """Matrices of 8 x 8 16-bit values: lanes 8 i .. 8 i + 7 have the rows of matrix i, lane l has row l / 4, pair l % 4."""
    loads, transposed = one.opcode[0] == "ldmatrix", "trans" in one.opcode
    registers, address = one.operands if loads else one.operands[::-1]
    where, n_rows = operands.address(address), 8 * len(vector(registers))
    writes = [operands.target(name) for name in vector(registers)] if loads else []
    reads = operands.sources(vector(registers), "b32")

    def load(warp: Warp, mask: Array) -> None:
        warp.check_all_lanes(mask, one.text)
        rows = warp.block.shared.load(where(warp)[:n_rows], 16, warp.access(one.text)).view(np.uint16)
        for i, write in enumerate(writes):
            matrix = rows[8 * i : 8 * i + 8]
            write(warp, np.ascontiguousarray(matrix.T if transposed else matrix).view(np.uint32).reshape(-1), mask)

    def store(warp: Warp, mask: Array) -> None:
        warp.check_all_lanes(mask, one.text)
        matrices = [read(warp).copy().view(np.uint16).reshape(8, 8) for read in reads]
        rows = np.concatenate([matrix.T if transposed else matrix for matrix in matrices])
        warp.block.shared.store(where(warp)[:n_rows], np.ascontiguousarray(rows).view(np.uint8), warp.access(one.text))

    return load if loads else store
