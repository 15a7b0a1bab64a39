"""The decode of a compound cross-layer transcoder, forward and backward: all source layers at once, and layer by layer.

    python benches/grouped_decode.py [--layers 12] [--width 768] [--tokens 1024] [--latents 1024] [--k 32] [--pairs 0]

Of the Triton backend counted, not timed: launches (its kernels, of which none runs, and stock ops that move something) and the
bytes that move beside the gathers of weight rows, which both need: what stock ops read and write, and the outputs of the decodes.
With `--pairs` the torch backend is timed as well, in so many pairs, one after the other. Layer by layer is what the model
did before there was `grouped_decode`: slices of one output that are added to.

Axes: B tokens · S source layers · P layers · D width · L latents of a source layer.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from counted_bytes import ALLOCATIONS, CountedBytes, aten
from crosscode_kernels import Backend, SparseLatents
from crosscode_kernels.grouped_decode import grouped_decode
from crosscode_kernels.sparse_decode import sparse_decode
from crosscode_kernels.triton_common.launch import recorded_launches
from torch import Tensor
from torch._library.custom_ops import OPDEFS


class Counted(CountedBytes):
    """Also how many ops moved something."""

    def __init__(self) -> None:
        super().__init__()
        self.n_ops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "crosscode":  # what it does, not what it is handed
            with self:
                return OPDEFS[func.name().partition(".")[0]]._init_fn(*args, **(kwargs or {}))
        before, out = self.moved, super().__torch_dispatch__(func, types, args, kwargs)
        self.n_ops += self.moved > before and func.overloadpacket not in ALLOCATIONS
        return out

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        if func.overloadpacket in PASSES:
            self.moved += PASSES[func.overloadpacket] * out.nbytes
        else:
            super()._count(func, args, kwargs, out)


PASSES = {aten.copy_: 2, aten.new_zeros: 1, aten.zeros_like: 1, aten.new_empty_strided: 0}
"""Of ops that do not read every tensor that they are handed: how often what they give back is read or written."""


def layer_by_layer(step: Step, backend: Backend) -> Tensor:
    y_BO = step.b_O.new_zeros(step.dy_BO.shape)
    for latents, W_LO, first in zip(step.latents_S, step.W_S, step.first_S, strict=True):
        y_BO[:, first : first + W_LO.shape[1]] += sparse_decode(latents, W_LO, None, backend=backend)
    return y_BO + step.b_O


def together(step: Step, backend: Backend) -> Tensor:
    return grouped_decode(step.latents_S, step.W_S, step.b_O, step.first_S, step.b_O.shape[0], backend=backend)


class Step:
    """Latents, weights and the output's gradient; gradients of values, weights and bias are wanted."""

    def __init__(self, sizes: argparse.Namespace) -> None:
        P, D, B, L = sizes.layers, sizes.width, sizes.tokens, sizes.latents
        torch.manual_seed(0)
        self.latents_S = [self._latents(B, L, sizes.k) for _ in range(P)]
        self.W_S = [torch.rand(L, (P - s) * D).requires_grad_() for s in range(P)]
        self.b_O, self.dy_BO = torch.rand(P * D).requires_grad_(), torch.rand(B, P * D)
        self.first_S = [s * D for s in range(P)]

    @staticmethod
    def _latents(B: int, L: int, k: int) -> SparseLatents:
        value_BK, idx_BK = torch.rand(B, L).topk(k)
        return SparseLatents.from_topk(idx_BK.int(), value_BK.requires_grad_(), L).with_transpose()

    def run(self, decode: Decode, backend: Backend) -> Tensor:
        for W_LO in self.W_S:
            W_LO.grad = None
        y_BO = decode(self, backend)
        y_BO.backward(self.dy_BO)
        return y_BO


Decode = Callable[[Step, Backend], Tensor]
COLUMNS: dict[str, Decode] = {"layer by layer": layer_by_layer, "all at once": together}


def counted(decode: Decode, sizes: argparse.Namespace) -> dict[str, float]:
    """Of the Triton backend."""
    step = Step(sizes)
    with recorded_launches() as record, Counted() as count:
        step.run(decode, Backend("triton"))
    # Their argument `y_ptr`.
    written = sum(launch.args[5].nbytes for launch in record if launch.kernel.__name__.endswith("_decode_kernel"))
    moved = (count.moved + written) / 1e9
    return {"Triton launches": len(record), "stock ops": count.n_ops, "GB beside the gathers": moved}


def timed(sizes: argparse.Namespace) -> dict[str, float]:
    """Median milliseconds of the torch backend."""
    step, seconds = Step(sizes), {name: [] for name in COLUMNS}
    for _ in range(sizes.pairs + 1):
        for name, decode in COLUMNS.items():
            started = time.perf_counter()
            step.run(decode, Backend("torch"))
            seconds[name].append(time.perf_counter() - started)
    return {name: 1e3 * median(each[1:]) for name, each in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"layers": 12, "width": 768, "tokens": 1024, "latents": 1024, "k": 32, "pairs": 0}
    for name, number in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=number)
    sizes = parser.parse_args()
    columns = {name: counted(decode, sizes) for name, decode in COLUMNS.items()}
    if sizes.pairs:
        for name, ms in timed(sizes).items():
            columns[name]["torch backend, ms"] = ms
    print("| | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for name in columns["all at once"]:
        print(f"| {name} | " + " | ".join(f"{column[name]:.4g}" for column in columns.values()) + " |")


if __name__ == "__main__":
    main()
