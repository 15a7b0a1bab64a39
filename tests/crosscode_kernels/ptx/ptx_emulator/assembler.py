"""Instructions as functions of a warp: operands are looked up once, at assembly.

Each opcode has a maker in `MAKERS`, which takes the instruction and its `Operands` and gives what happens when the lanes in
`mask` execute it. Makers are added by the modules `arithmetic`, `conversions`, `exchange` and `transfers`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ptx_emulator.program import Instruction, Program, split_operands
from ptx_emulator.values import BITS, DTYPES, N_LANES, Array

if TYPE_CHECKING:
    from ptx_emulator.machine import Warp

Source = Callable[["Warp"], Array]
Target = Callable[["Warp", Array, Array], None]
Action = Callable[["Warp", Array], None]
Maker = Callable[[Instruction, "Operands"], Action]
MAKERS: dict[str, Maker] = {}

ALL_LANES = ("shfl", "redux", "vote", "ldmatrix", "stmatrix")
"""Instructions for which the live lanes of a warp wait for each other."""


class Unsupported(Exception):
    """An instruction that is not emulated; tensor cores above all."""


class Step(NamedTuple):
    """An assembled instruction. `kind`: "run", "all lanes", "branch", "return" or "barrier"; `guard`: register of the predicate
    that lanes need (negated where `negated`), or -1; `target`: where a branch leads."""

    kind: str
    action: Action
    guard: int
    negated: bool
    target: int
    text: str


def maker(*names: str) -> Callable[[Maker], Maker]:
    """Decorator: makes the opcodes that start with one of `names`."""

    def add(function: Maker) -> Maker:
        MAKERS.update(dict.fromkeys(names, function))
        return function

    return add


class Operands:
    """Finds the operands of a program: registers by number, constants as arrays of lanes."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.index = {name: i for i, name in enumerate(program.registers)}
        self.dtypes = [stored_dtype(kind) for kind in program.registers.values()]

    def source(self, operand: str, kind: str) -> Source:
        """Lanes of an operand as `kind`; of a wider register the low bits."""
        wanted = DTYPES[kind]
        if operand in self.index:
            i, stored = self.index[operand], self.dtypes[self.index[operand]]
            if stored == wanted:
                return lambda warp: warp.registers[i]
            if stored.itemsize == wanted.itemsize:
                return lambda warp: warp.registers[i].view(wanted)
            bits = BITS[wanted.itemsize]
            return lambda warp: warp.registers[i].astype(bits).view(wanted)
        if operand.startswith("%"):
            return lambda warp: warp.special[operand]
        constant = self._constant(operand, wanted)
        return lambda warp: constant

    def _constant(self, operand: str, wanted: np.dtype[Any]) -> Array:
        if wanted == np.bool_:
            return np.full(N_LANES, bool(int(operand, 0)))
        bits = BITS[wanted.itemsize]
        if operand == "global_smem":  # shared memory starts at 0
            value = 0
        elif operand[:2] in ("0f", "0d"):
            value = int(operand[2:], 16)
        else:
            value = int(operand.rstrip("U"), 0) & ((1 << 8 * wanted.itemsize) - 1)
        return np.full(N_LANES, value, bits).view(wanted)

    def sources(self, operands: tuple[str, ...] | list[str], kind: str) -> list[Source]:
        return [self.source(operand, kind) for operand in operands]

    def target(self, operand: str) -> Target:
        """Writes lanes of a register; narrower values are extended as their type says."""
        if operand == "_":
            return lambda warp, values, mask: None
        i, stored = self.index[operand], self.dtypes[self.index[operand]]

        def write(warp: Warp, values: Array, mask: Array) -> None:
            same_size = values.dtype.itemsize == stored.itemsize and stored != np.bool_
            np.copyto(warp.registers[i], values.view(stored) if same_size else values.astype(stored), where=mask)

        return write

    def kind(self, operand: str) -> str:
        return self.program.registers[operand]

    def address(self, operand: str) -> Source:
        """Lanes of `[register+offset]`."""
        found = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        if found is None:
            raise Unsupported(f"address {operand}")
        base, offset = self.source(found[1], self._address_kind(found[1])), int(found[2] or 0)
        return lambda warp: base(warp).astype(np.int64) + offset

    def _address_kind(self, name: str) -> str:
        return self.program.registers.get(name, "b32")


def stored_dtype(kind: str) -> np.dtype[Any]:
    """How a register of a type is held."""
    return DTYPES["pred"] if kind == "pred" else BITS[DTYPES[kind].itemsize]


def vector(operand: str) -> list[str]:
    """The parts of `{a, b}`, or the operand alone."""
    return split_operands(operand.strip("{} \t")) if operand.startswith("{") else [operand]


def _nothing(warp: Warp, mask: Array) -> None:
    pass


def assemble(program: Program) -> list[Step]:
    """Every instruction. Raises Unsupported at one that is not emulated."""
    operands = Operands(program)
    return [_step(one, operands, program) for one in program.instructions]


def _step(one: Instruction, operands: Operands, program: Program) -> Step:
    kind, action, target, name = "run", _nothing, -1, one.opcode[0]
    if name == "bra":
        kind, target = "branch", program.labels[one.operands[0]]
    elif name in ("ret", "exit"):
        kind = "return"
    elif one.opcode[:2] == ("bar", "sync"):
        kind = "barrier"
    elif name in ("fence", "membar") or one.opcode[:2] == ("bar", "warp"):
        pass  # memory is as it was executed, here
    elif name in MAKERS:
        kind = "all lanes" if name in ALL_LANES else "run"
        action = MAKERS[name](one, operands)
    else:
        raise Unsupported(one.text)
    guard = operands.index[one.guard.lstrip("!")] if one.guard else -1
    return Step(kind, action, guard, one.guard.startswith("!"), target, one.text)
