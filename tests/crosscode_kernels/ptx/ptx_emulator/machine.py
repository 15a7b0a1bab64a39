"""Warps, blocks and grids.

Between barriers a block's warps run in random turns of random length; the order of the blocks is random. Within a warp the lanes
furthest behind go on, until those that diverged meet again; at instructions that need all lanes, the live ones wait.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np

from ptx_emulator.assembler import Step, stored_dtype
from ptx_emulator.memory import Access, Fault, Region, Space
from ptx_emulator.program import Program
from ptx_emulator.values import LANES, N_LANES, Array

Index = tuple[int, int, int]
Findings = Counter[str]
TURNS = (1, 7, 40, 300, 100_000)
"""How many instructions a warp gets at a time."""
POISON = 0xA5


class Kernel:
    """A program, ready to run."""

    def __init__(self, program: Program, steps: list[Step]) -> None:
        self.program, self.steps = program, steps
        self.dtypes = [stored_dtype(kind) for kind in program.registers.values()]


class Warp:
    def __init__(self, block: Block, number: int) -> None:
        self.block, self.number = block, number
        self.registers = [np.zeros(N_LANES, dtype) for dtype in block.kernel.dtypes]
        self.special = {"%tid.x": (LANES + N_LANES * number).astype(np.uint32)}
        for i, axis in enumerate("xyz"):
            self.special[f"%ctaid.{axis}"] = np.full(N_LANES, block.index[i], np.uint32)
            self.special[f"%nctaid.{axis}"] = np.full(N_LANES, block.grid[i], np.uint32)
        self.at = np.zeros(N_LANES, np.int64)
        self.done, self.at_barrier, self.at_exchange = (np.zeros(N_LANES, np.bool_) for _ in range(3))
        self.barriers: set[int] = set()
        self.waits = False
        self.issued: list[tuple[Array, Array, Access]] = []
        self.groups: list[list[tuple[Array, Array, Access]]] = []

    def access(self, text: str) -> Access:
        return Access(
            self.block.number, self.block.epoch, self.number, text, lambda what: self.block.report(what, text)
        )

    def space(self, name: str) -> Space:
        return self.block.shared if name == "shared" else self.block.memory

    def check_all_lanes(self, mask: Array, text: str) -> None:
        if not (mask | self.done).all():
            self.block.report("not reached by all lanes of a warp", text)

    def commit_copies(self) -> None:
        self.groups.append(self.issued)
        self.issued = []

    def wait_for_copies(self, n_may_remain: int) -> None:
        while len(self.groups) > n_may_remain:
            for addresses, data, access in self.groups.pop(0):
                self.block.shared.store(addresses, data, access._replace(epoch=self.block.epoch))

    def run(self, n_steps: int) -> None:
        """So many instructions, or up to a barrier or the end."""
        steps = self.block.kernel.steps
        while n_steps > 0 and not self.done.all():
            lanes = self._next_lanes()
            if lanes is None:
                self.waits = True
                return
            at = int(self.at[lanes.argmax()])
            step = steps[at]
            if step.kind == "all lanes" and not self.at_exchange[lanes].all() and not (lanes | self.done).all():
                self.at_exchange |= lanes
                continue
            self.at_exchange &= ~lanes
            n_steps -= 1
            active = lanes
            if step.guard >= 0:
                active = lanes & (self.registers[step.guard] ^ step.negated)
            self.at[lanes] = at + 1
            if step.kind == "branch":
                self.at[active] = step.target
            elif step.kind == "return":
                self.done |= active
            elif step.kind == "barrier":
                self.at_barrier |= lanes
                self.barriers.add(at)
            elif active.any():
                step.action(self, active)

    def _next_lanes(self) -> Array | None:
        """The lanes to go on with; None where all wait at a barrier."""
        free = ~(self.done | self.at_barrier | self.at_exchange)
        if not free.any():
            if not self.at_exchange.any():
                return None
            places = self.at[self.at_exchange]
            if self.at_barrier.any() or (places != places[0]).any():
                raise Fault("lanes of a warp wait at different barriers or shuffles")
            return self.at_exchange.copy()
        return free & (self.at == self.at[free].min())


class Block:
    def __init__(
        self, kernel: Kernel, index: Index, grid: Index, params: Mapping[str, int], memory: Space, findings: Findings
    ) -> None:
        self.kernel, self.index, self.grid, self.params = kernel, index, grid, params
        self.memory, self.findings, self.epoch = memory, findings, 0
        self.number = index[0] + grid[0] * (index[1] + grid[1] * index[2])
        n_bytes = max(kernel.program.shared_bytes, 1)
        region = Region(0, np.full(n_bytes, POISON, np.uint8), written=np.zeros(n_bytes, np.bool_))
        self.shared = Space("shared", [region])
        self.warps = [Warp(self, number) for number in range(kernel.program.num_warps)]

    def report(self, what: str, text: str) -> None:
        self.findings[f"{what}: {text}"] += 1

    def run(self, chance: random.Random) -> None:
        while True:
            ready = [warp for warp in self.warps if not warp.waits and not warp.done.all()]
            if ready:
                chance.choice(ready).run(chance.choice(TURNS))
            elif any(warp.waits for warp in self.warps):
                self._pass_barrier()
            else:
                return

    def _pass_barrier(self) -> None:
        waiting = [warp for warp in self.warps if warp.waits]
        if len(waiting) < len(self.warps):
            self.report("some warps ended before it", "bar.sync")
        if len(set().union(*(warp.barriers for warp in waiting))) > 1:
            self.report("threads of a block meet at different ones", "bar.sync")
        for warp in waiting:
            warp.waits, warp.barriers = False, set()
            warp.at_barrier[:] = False
        self.epoch += 1


def run_grid(
    kernel: Kernel,
    grid: Index,
    indices: Iterable[Index],
    params: Mapping[str, int],
    memory: Space,
    chance: random.Random,
) -> Findings:
    """Run the blocks `indices` of a grid in that order; what was found wrong, and how often."""
    findings: Findings = Counter()
    for index in indices:
        Block(kernel, index, grid, params, memory, findings).run(chance)
    return findings
