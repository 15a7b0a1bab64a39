"""What an NVIDIA kernel's hottest loop does, read from its disassembly: loads in flight, and instructions per byte loaded.

The hottest loop is the innermost one that loads most from global memory; a kernel without such a loop is taken whole.
Counts are of one thread and one iteration. A kernel is bound by latency where few loads are in flight, and by issue where it
spends many instructions on a byte: no figure of traffic shows either.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_LOAD = re.compile(r"\bLDG\.E\S*\s+(?:P\w+,\s*)?R(\d+)")
_COPY = re.compile(r"\bLDGSTS\.E\S*")
_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


class LoopFacts(NamedTuple):
    """`loads_in_flight`: most loads of the widest kind that are issued before the first of them is used. `instructions_around`:
    those of the loop around the hottest one, without the loops in it. None without a load, and without such a loop."""

    loads_in_flight: int | None
    instructions_per_byte: float | None
    instructions_around: int | None


def instructions(sass: str) -> tuple[list[str], list[range]]:
    """The instructions of a kernel, and its loops (backward branches) as ranges of them."""
    found: list[str] = []
    labels: dict[str, int] = {}
    for line in map(str.strip, sass.splitlines()):
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(found)
        elif instruction := re.match(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            found.append(instruction[1].replace(".reuse", ""))
    loops = []
    for i, text in enumerate(found):
        branch = re.search(r"\bBRA\b.*`\((\.L_\w+)\)", text)
        if branch and labels.get(branch[1], i) < i:
            loops.append(range(labels[branch[1]], i + 1))
    return found, loops


def _n_bytes(text: str) -> int:
    """What one thread brings from global memory."""
    kind = _LOAD.search(text) or _COPY.search(text)
    if kind is None:
        return 0
    width = re.search(r"\.(U8|S8|U16|S16|64|128|256)\b", kind[0])
    return _BYTES[width[1]] if width else 4


def _uses(text: str, first: int, n_bytes: int) -> bool:
    """Whether an instruction reads one of the registers from `first` on that a load of `n_bytes` filled."""
    stripped = re.sub(r"^@!?U?P\w+\s+", "", text)
    registers = [int(number) for number in re.findall(r"\bR(\d+)\b", stripped)]
    stores = re.match(r"(ST|RED|ATOM|[IFHD]SETP|BRA)", stripped) is not None
    read = registers if stores or _LOAD.search(text) else registers[1:]
    return any(first <= register < first + max(n_bytes // 4, 1) for register in read)


def _in_flight(body: list[str]) -> int:
    widest = max(map(_n_bytes, body))
    if copies := sum(_COPY.search(text) is not None for text in body):
        waits = [int(found[1], 0) for text in body if (found := re.search(r"\bDEPBAR\.LE SB0, (\w+)", text))]
        return copies * (1 + min(waits, default=0))
    spans = []
    for i, text in enumerate(body):
        if (load := _LOAD.search(text)) and _n_bytes(text) == widest:
            later = [(i + step) % len(body) for step in range(1, len(body))]
            use = next((step for step, j in enumerate(later, 1) if _uses(body[j], int(load[1]), widest)), len(body))
            spans.append((i, i + use))
    # A load of the last iteration may still be on its way: shifted by one length it counts as well.
    shifted = spans + [(first - len(body), last - len(body)) for first, last in spans]
    return max(sum(first <= at < last for first, last in shifted) for at, _ in spans)


def loop_facts(sass: str) -> LoopFacts:
    """See the top of this file."""
    found, loops = instructions(sass)

    def within(one: range) -> list[range]:
        return [other for other in loops if other != one and set(other) < set(one)]

    inner = [one for one in loops if not within(one)]
    hot = max(inner, key=lambda one: sum(_n_bytes(found[i]) for i in one), default=range(0))
    if not any(_n_bytes(found[i]) for i in hot):
        hot = range(len(found))
    hottest = [found[i] for i in hot]
    n_bytes = sum(map(_n_bytes, hottest))
    if n_bytes == 0:
        return LoopFacts(None, None, None)
    outer = min((one for one in loops if hot in within(one)), key=len, default=None)
    around = None if outer is None else len(set(outer).difference(*within(outer)))
    return LoopFacts(_in_flight(hottest), round(len(hottest) / n_bytes, 2), around)
