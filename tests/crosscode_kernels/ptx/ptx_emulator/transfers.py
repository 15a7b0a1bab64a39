"""Loads, stores, atomics and asynchronous copies."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from ptx_emulator.assembler import Action, Operands, Unsupported, maker, vector
from ptx_emulator.program import Instruction
from ptx_emulator.values import BITS, DTYPES, N_LANES, Array

if TYPE_CHECKING:
    from ptx_emulator.machine import Warp


def _space(one: Instruction) -> str:
    for part in one.opcode:
        if part.partition("::")[0] in ("shared", "global"):
            return part.partition("::")[0]
    raise Unsupported(one.text)


@maker("ld")
def _load(one: Instruction, operands: Operands) -> Action:
    kind = one.types[-1]
    if "param" in one.opcode:
        return _parameter(one, operands, kind)
    space, dtype, address = _space(one), DTYPES[kind], operands.address(one.operands[1])
    writes = [operands.target(name) for name in vector(one.operands[0])]

    def run(warp: Warp, mask: Array) -> None:
        lanes = np.flatnonzero(mask)
        data = warp.space(space).load(address(warp)[lanes], dtype.itemsize * len(writes), warp.access(one.text))
        values = np.zeros((N_LANES, len(writes)), dtype)
        values[lanes] = data.view(dtype)
        for write, column in zip(writes, np.ascontiguousarray(values.T), strict=True):
            write(warp, column, mask)

    return run


def _parameter(one: Instruction, operands: Operands, kind: str) -> Action:
    write, name = operands.target(one.operands[0]), one.operands[1].strip("[]")
    bits = BITS[DTYPES[kind].itemsize]

    def run(warp: Warp, mask: Array) -> None:
        value = warp.block.params[name] & ((1 << 8 * bits.itemsize) - 1)
        write(warp, np.full(N_LANES, value, bits).view(DTYPES[kind]), mask)

    return run


@maker("st")
def _store(one: Instruction, operands: Operands) -> Action:
    space, address = _space(one), operands.address(one.operands[0])
    kind = f"b{8 * DTYPES[one.types[-1]].itemsize}"
    reads = operands.sources(vector(one.operands[1]), kind)

    def run(warp: Warp, mask: Array) -> None:
        values = np.stack([read(warp)[mask] for read in reads], 1)
        warp.space(space).store(address(warp)[mask], values.view(np.uint8), warp.access(one.text))

    return run


@maker("atom", "red")
def _atomic(one: Instruction, operands: Operands) -> Action:
    if "add" not in one.opcode or one.types[-1].endswith("x2"):
        raise Unsupported(one.text)
    space, kind = _space(one), one.types[-1]
    old_to = operands.target(one.operands[0]) if one.opcode[0] == "atom" else None
    address, value = one.operands[-2:]
    where, added = operands.address(address), operands.source(value, kind)

    def run(warp: Warp, mask: Array) -> None:
        addresses, values, old = where(warp), added(warp), np.zeros(N_LANES, DTYPES[kind])
        for lane in np.flatnonzero(mask):
            old[lane] = warp.space(space).add(addresses[lane], values[lane : lane + 1], warp.access(one.text))[0]
        if old_to:
            old_to(warp, old, mask)

    return run


@maker("cp")
def _copy(one: Instruction, operands: Operands) -> Action:
    """`cp.async`: read when it is issued, in shared memory when its group is waited for."""
    if "commit_group" in one.opcode:
        return lambda warp, mask: warp.commit_copies()
    if "wait_group" in one.opcode:
        return lambda warp, mask: warp.wait_for_copies(int(one.operands[0], 0))
    if not re.match(r"cp\.async\.c[ag]\.shared\.global", one.text):
        raise Unsupported(one.text)
    to, of = (operands.address(operand) for operand in one.operands[:2])
    size = int(list(one.operands)[2], 0)
    given = operands.source(one.operands[-1], "b32")

    def run(warp: Warp, mask: Array) -> None:
        n = given(warp)[mask]
        if ((n != 0) & (n != size)).any():
            raise Unsupported(f"a copy of a part: {one.text}")
        data = np.zeros((n.size, size), np.uint8)
        if n.any():
            data[n != 0] = warp.block.memory.load(of(warp)[mask][n != 0], size, warp.access(one.text))
        warp.issued.append((to(warp)[mask], data, warp.access(one.text)))

    return run
