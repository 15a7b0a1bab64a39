"""What issue and latency cost a kernel, from the figures that `static_loops.py` reads in its disassembly.

Neither shows in bytes or FLOPs. `issue`: the instructions of its loops over what the schedulers issue. `latency`: loads that
wait for one another (an index, then what it points at), over the warps that are resident at a time. Lower bounds of a
kernel's time, each as if nothing else took any: predictions, as all of the traffic model. Where no figures are stored: nothing.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

STORED = Path(__file__).parent / "results" / "compile_matrix.json"
LANES, SCHEDULERS, ISSUED, CACHE_LATENCY = 32, 4, 0.8, 300e-9
"""Of a warp; of a multiprocessor. Assumed: the share of its slots that a scheduler fills, seconds of a load from a busy cache."""


Constants = tuple[tuple[str, str], ...]


class Work(NamedTuple):
    """`asked`: bytes that threads load in the hottest loop of `kernel`, whatever cache they come from; `loop`: constants by which
    that loop is found. `outer`: another kernel around the same loop, with constants `of_outer`: its registers count, and its
    instructions around the loop, `around` times. `streamed`: bytes that are loaded beside it. `waits`: how often a warp waits
    for a load from the cache on which others depend."""

    kernel: str
    asked: float
    loop: Constants = ()
    outer: str = ""
    of_outer: Constants = ()
    streamed: float = 0.0
    waits: float = 0.0
    around: float = 0.0

    def seconds(self, device: Any, element_size: int) -> dict[str, float]:
        """Empty where the disassembly is not known (AMD, or not compiled)."""
        hot = facts(self.kernel, device.target, element_size, self.loop)
        outer = facts(self.outer, device.target, element_size, self.of_outer) if self.outer else hot
        if hot is None or outer is None:
            return {}
        n = (self.asked + self.streamed) / LANES * hot["instructions_per_byte"]
        n += self.around * (outer.get("instructions_around") or 0)
        return {
            "issue": n / (device.units * SCHEDULERS * device.clock * ISSUED),
            "latency": self.waits * CACHE_LATENCY / (device.units * outer["warps_per_unit"]),
        }


@functools.cache
def _rows() -> list[dict[str, Any]]:
    return [row for row in json.loads(STORED.read_text()) if row.get("instructions_per_byte")]


@functools.cache
def facts(kernel: str, target: str, element_size: int, constants: Constants) -> dict[str, Any] | None:
    """The row of the compile matrix with the most instructions a byte, among those of the largest case there is."""
    dtype = {2: "*bf16", 4: "*fp32"}[element_size]
    found = [
        row
        for row in _rows()
        if (row["kernel"], row["target"]) == (kernel, target)
        and dtype in row["dtypes"]
        and (element_size == 2 or "*bf16" not in row["dtypes"])
        and all(row["constants"].get(name, value) == value for name, value in constants)
    ]
    found = [row for row in found if "131k" in row["where"]] or found
    return max(found, key=lambda row: row["instructions_per_byte"], default=None)
