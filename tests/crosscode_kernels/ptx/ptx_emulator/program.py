"""PTX text as instructions.

Only what Triton emits is understood: one entry, registers declared in ranges, no calls.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple


class Instruction(NamedTuple):
    """`opcode` is split at its dots; `guard` is the predicate that lanes need ("%p1", "!%p1"), or ""."""

    text: str
    guard: str
    opcode: tuple[str, ...]
    operands: tuple[str, ...]

    @property
    def types(self) -> list[str]:
        """The types in the opcode, in order."""
        return [part for part in self.opcode if re.fullmatch(r"(pred|[busf](8|16|32|64)|bf16|[us]16x2|b?f16x2)", part)]


@dataclass
class Program:
    """A kernel. `registers` and `params` say the PTX type of each; labels are indices of instructions."""

    params: dict[str, str]
    registers: dict[str, str]
    instructions: list[Instruction]
    labels: dict[str, int]
    shared_bytes: int
    num_warps: int


def split_operands(text: str) -> list[str]:
    """At commas outside of braces and brackets."""
    return [part.strip() for part in re.split(r",(?![^{\[]*[}\]])", text) if part.strip()]


def parse_instruction(text: str) -> Instruction:
    guard, text = re.match(r"(?:@(!?%p\d+)\s+)?(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
    opcode, *rest = text.split(None, 1)
    operands = split_operands(rest[0]) if rest else []
    return Instruction(text, guard or "", tuple(opcode.split(".")), tuple(operands))


def parse(ptx: str, shared_bytes: int, num_warps: int) -> Program:
    """The one kernel of `ptx`."""
    params = {name: kind for kind, name in re.findall(r"\.param \.(\w+) [^\n,]*?(\w+_param_\d+)", ptx)}
    body = re.sub(r"//[^\n]*", "", ptx[ptx.index(".reqntid") :])
    registers = {
        f"%{prefix}{i}": kind
        for kind, prefix, count in re.findall(r"\.reg \.(\w+)\s+%(\w+)<(\d+)>", body)
        for i in range(int(count))
    }
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in map(str.strip, body.split("\n")):
        if label := re.fullmatch(r"(\$\w+):", line):
            labels[label[1]] = len(instructions)
        elif line.endswith(";") and not line.startswith((".", "$")):
            instructions.append(parse_instruction(line[:-1].strip()))
    return Program(params, registers, instructions, labels, shared_bytes, num_warps)
