"""Arithmetic, logic, shifts, comparisons and selects."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ptx_emulator.assembler import Action, Operands, Unsupported, maker, vector
from ptx_emulator.program import Instruction
from ptx_emulator.values import BITS, DTYPES, N_LANES, Array, from_float32, halves, packed, to_float32

if TYPE_CHECKING:
    from ptx_emulator.machine import Warp

Function = Callable[..., Array]
FLOATS = ("f16", "bf16", "f32")


def _divide(x: Array, y: Array) -> Array:
    if x.dtype.kind == "f":
        return x / y
    safe = np.where(y == 0, 1, y)
    return np.where(y == 0, -1, np.trunc(x.astype(np.float64) / safe)).astype(x.dtype)


BINARY: dict[str, Function] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": _divide, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "min": np.fmin, "max": np.fmax,
}  # fmt: skip
UNARY: dict[str, Function] = {
    "not": np.invert, "neg": np.negative, "abs": np.abs, "sqrt": np.sqrt, "ex2": np.exp2, "lg2": np.log2,
    "rcp": lambda x: np.float32(1) / x, "rsqrt": lambda x: np.float32(1) / np.sqrt(x),
    "popc": np.bitwise_count,
}  # fmt: skip
NOT_A_NUMBER: dict[str, Function] = {"min": np.minimum, "max": np.maximum}
"""`min.NaN`: a NaN stays one."""


def _elementwise(one: Instruction, operands: Operands, function: Function) -> Action:
    """`function` of all operands, in float32 where they are 16-bit floats."""
    kind = one.types[-1]
    write = operands.target(one.operands[0])
    if kind.endswith("x2"):
        sources = operands.sources(one.operands[1:], "b32")
        return lambda warp, mask: write(warp, _of_halves(kind[:-2], function, [read(warp) for read in sources]), mask)
    sources = operands.sources(one.operands[1:], kind)
    if kind in ("f16", "bf16"):
        return lambda warp, mask: write(
            warp, from_float32(function(*[to_float32(read(warp), kind) for read in sources]), kind), mask
        )
    return lambda warp, mask: write(warp, function(*[read(warp) for read in sources]), mask)


def _of_halves(kind: str, function: Function, values: list[Array]) -> Array:
    pairs = [halves(value, kind) for value in values]
    if kind in FLOATS:
        low, high = (from_float32(function(*[to_float32(pair[i], kind) for pair in pairs]), kind) for i in range(2))
    else:
        low, high = (function(*[pair[i] for pair in pairs]) for i in range(2))
    return packed(low, high)


@maker(*BINARY)
def _binary(one: Instruction, operands: Operands) -> Action:
    name = one.opcode[0]
    if name == "mul" and "wide" in one.opcode:
        return _widening(one, operands)
    if "hi" in one.opcode or "sat" in one.opcode:
        raise Unsupported(one.text)
    return _elementwise(one, operands, (NOT_A_NUMBER if "NaN" in one.opcode else BINARY)[name])


@maker(*UNARY)
def _unary(one: Instruction, operands: Operands) -> Action:
    return _elementwise(one, operands, UNARY[one.opcode[0]])


@maker("fma")
def _fused(one: Instruction, operands: Operands) -> Action:
    def fused(x: Array, y: Array, z: Array) -> Array:
        return (x.astype(np.float64) * y + z).astype(np.float32)

    return _elementwise(one, operands, fused)


@maker("mad")
def _multiply_add(one: Instruction, operands: Operands) -> Action:
    if "wide" in one.opcode:
        return _widening(one, operands)
    if "lo" not in one.opcode:
        raise Unsupported(one.text)
    return _elementwise(one, operands, lambda x, y, z: x * y + z)


def _widening(one: Instruction, operands: Operands) -> Action:
    """`mul.wide`, `mad.wide`: a product of twice the size."""
    kind = one.types[-1]
    wide = f"{kind[0]}{2 * int(kind[1:])}"
    write = operands.target(one.operands[0])
    x, y = operands.sources(one.operands[1:3], kind)
    added = operands.sources(one.operands[3:], wide)

    def run(warp: Warp, mask: Array) -> None:
        product = x(warp).astype(DTYPES[wide]) * y(warp).astype(DTYPES[wide])
        write(warp, sum((read(warp) for read in added), start=product), mask)

    return run


@maker("shl", "shr")
def _shift(one: Instruction, operands: Operands) -> Action:
    kind = one.types[-1]
    dtype, n_bits = DTYPES[kind], 8 * DTYPES[kind].itemsize
    write, x, by = operands.target(one.operands[0]), operands.source(one.operands[1], kind), one.operands[2]
    amount = operands.source(by, "b32")

    def run(warp: Warp, mask: Array) -> None:
        value, n = x(warp), amount(warp)
        least = np.minimum(n, n_bits - 1).astype(dtype)
        if one.opcode[0] == "shl":
            shifted = np.where(n >= n_bits, 0, value << least)
        else:
            shifted = value >> least if dtype.kind == "i" else np.where(n >= n_bits, 0, value >> least)
        write(warp, shifted.astype(dtype), mask)

    return run


@maker("bfe")
def _extract(one: Instruction, operands: Operands) -> Action:
    write, x = operands.target(one.operands[0]), operands.source(one.operands[1], "b32")
    first, n_bits = (int(operand, 0) for operand in one.operands[2:4])

    def run(warp: Warp, mask: Array) -> None:
        value = (x(warp).astype(np.int64) >> first) & ((1 << n_bits) - 1)
        if one.types[-1] == "s32":
            value = (value ^ (1 << (n_bits - 1))) - (1 << (n_bits - 1))
        write(warp, value.astype(np.int32), mask)

    return run


@maker("selp")
def _select(one: Instruction, operands: Operands) -> Action:
    write = operands.target(one.operands[0])
    x, y = operands.sources(one.operands[1:3], one.types[-1])
    chosen = operands.source(one.operands[3], "pred")
    return lambda warp, mask: write(warp, np.where(chosen(warp), x(warp), y(warp)), mask)


COMPARE: dict[str, Function] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip


def _comparison(name: str, kind: str) -> Function:
    """Of floats: false with a NaN, true for the forms that end in u."""
    if kind not in FLOATS:
        return COMPARE[name]

    def either_nan(x: Array, y: Array) -> Array:
        return np.isnan(to_float32(x, kind)) | np.isnan(to_float32(y, kind))

    if name == "nan":
        return either_nan
    if name == "num":
        return lambda x, y: ~either_nan(x, y)
    unordered = name.endswith("u")
    compare = COMPARE[name.removesuffix("u")]
    return lambda x, y: np.where(either_nan(x, y), unordered, compare(to_float32(x, kind), to_float32(y, kind)))


@maker("setp")
def _compare(one: Instruction, operands: Operands) -> Action:
    kind, targets = one.types[-1], [operands.target(name) for name in one.operands[0].split("|")]
    if kind.endswith("x2"):
        compare = _comparison(one.opcode[1], kind[:-2])
        x, y = operands.sources(one.operands[1:3], "b32")

        def run(warp: Warp, mask: Array) -> None:
            sides = zip(halves(x(warp), kind[:-2]), halves(y(warp), kind[:-2]), strict=True)
            for write, result in zip(targets, [compare(*pair) for pair in sides], strict=True):
                write(warp, result, mask)

        return run
    compare = _comparison(one.opcode[1], kind)
    x, y = operands.sources(one.operands[1:3], kind)
    join = next((BINARY[part] for part in one.opcode[2:] if part in ("and", "or", "xor")), None)
    if join is None:
        return lambda warp, mask: targets[0](warp, compare(x(warp), y(warp)), mask)
    last = operands.source(one.operands[3].lstrip("!"), "pred")
    negated = one.operands[3].startswith("!")
    return lambda warp, mask: targets[0](warp, join(compare(x(warp), y(warp)), last(warp) ^ negated), mask)


@maker("mov")
def _move(one: Instruction, operands: Operands) -> Action:
    """Also splits a register into parts, or joins parts."""
    kind, (target, source) = one.types[-1], one.operands
    parts = vector(target if target.startswith("{") else source)
    if len(parts) == 1:
        return _elementwise(one, operands, lambda x: x)
    whole, n_bits = BITS[DTYPES[kind].itemsize], 8 * DTYPES[kind].itemsize // len(parts)
    if target.startswith("{"):
        read, writes = operands.source(source, f"b{8 * whole.itemsize}"), [operands.target(part) for part in parts]

        def split(warp: Warp, mask: Array) -> None:
            value = read(warp).copy()
            for i, write in enumerate(writes):
                write(warp, (value >> whole.type(i * n_bits)).astype(BITS[n_bits // 8]), mask)

        return split
    write, reads = operands.target(target), operands.sources(parts, f"b{n_bits}")

    def join(warp: Warp, mask: Array) -> None:
        value = np.zeros(N_LANES, whole)
        for i, read in enumerate(reads):
            value |= read(warp).astype(whole) << whole.type(i * n_bits)
        write(warp, value, mask)

    return join
