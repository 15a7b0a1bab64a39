"""Shuffle buffer: one tensor against a Python list of tensors.

B batch · N rows of the buffer · D model dimension.

    python benches/data_shuffle.py [rounds]
"""

from __future__ import annotations

import random
import sys
from functools import partial
from typing import Any

import torch
from data_common import interleaved, report

from crosscode.data.shuffle import ShuffleBuffer

D = 768
N_DRAWN = 8192


class ListBuffer:
    """The plain way: one tensor an activation, drawn and replaced one by one."""

    def __init__(self, rows_ND: torch.Tensor) -> None:
        self.rows = list(rows_ND.unbind(0))
        self.random = random.Random(0)

    def step(self, rows_BD: torch.Tensor) -> torch.Tensor:
        batch = []
        for row_D in rows_BD.unbind(0):
            place = self.random.randrange(len(self.rows))
            batch.append(self.rows[place])
            self.rows[place] = row_D.clone()
        return torch.stack(batch)


class TensorBuffer:
    def __init__(self, rows_ND: torch.Tensor) -> None:
        generator = torch.Generator().manual_seed(0)
        self.buffer = ShuffleBuffer(rows_ND.shape[0], (D,), generator=generator)
        self.buffer.put(rows_ND)

    def step(self, rows_BD: torch.Tensor) -> torch.Tensor:
        batch_BD = self.buffer.take(rows_BD.shape[0])
        self.buffer.put(rows_BD)
        return batch_BD


def run(buffer: ListBuffer | TensorBuffer, rows_BD: torch.Tensor) -> None:
    for _ in range(N_DRAWN // rows_BD.shape[0]):
        buffer.step(rows_BD)


def main(rounds: int) -> None:
    table: list[dict[str, Any]] = []
    for N in (16_384, 65_536, 262_144):
        rows_ND = torch.randn(N, D)
        for B in (1024, 4096):
            rows_BD = torch.randn(B, D)
            buffers = {"list of tensors": ListBuffer(rows_ND), "crosscode": TensorBuffer(rows_ND)}
            times = interleaved({k: partial(run, b, rows_BD) for k, b in buffers.items()}, rounds)
            for label, time in times.items():
                table.append(
                    {
                        "buffer": N,
                        "batch": B,
                        "way": label,
                        "activations_per_s": N_DRAWN / time.wall,
                        "at_best": N_DRAWN / time.best,
                        "per_cpu_second": N_DRAWN / time.cpu,
                        "times_list": times["list of tensors"].wall / time.wall,
                    }
                )
    report("data_shuffle", table, D=D, rounds=rounds)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
