"""The decode of a compound cross-layer transcoder, forward and backward: all source layers at once, and layer by layer.

    python benches/grouped_decode.py [--layers 12] [--width 768] [--tokens 1024] [--latents 1024] [--k 32]

Counted, not timed: launches (Triton's kernels, of which none runs, and stock ops that move something) and the bytes that move
beside the gathers of weight rows, which both need: what stock ops read and write, and the outputs of Triton's decodes. Layer by
layer is what the model did before there was `grouped_decode`: slices of one output that are added to.

Axes: B tokens · S source layers · P layers · D width · L latents of a source layer.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from counted_bytes import ALLOCATIONS, CountedBytes
from crosscode_kernels import Backend, SparseLatents
from crosscode_kernels.grouped_decode import grouped_decode
from crosscode_kernels.sparse_decode import sparse_decode
from crosscode_kernels.triton_common.launch import recorded_launches
from torch import Tensor

BACKEND = Backend("triton")


class Counted(CountedBytes):
    """Also how many ops moved something."""

    def __init__(self) -> None:
        super().__init__()
        self.n_ops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before, out = self.moved, super().__torch_dispatch__(func, types, args, kwargs)
        self.n_ops += self.moved > before and func.overloadpacket not in ALLOCATIONS
        return out


def layer_by_layer(
    latents_S: Sequence[SparseLatents], W_S: Sequence[Tensor], b_O: Tensor, first_S: list[int]
) -> Tensor:
    y_BO: Tensor | None = None
    for latents, W_LO, first in zip(latents_S, W_S, first_S, strict=True):
        part_BO = sparse_decode(latents, W_LO, None, backend=BACKEND)
        y_BO = part_BO.new_zeros(part_BO.shape[0], b_O.shape[0]) if y_BO is None else y_BO
        y_BO[:, first : first + W_LO.shape[1]] += part_BO
    assert y_BO is not None
    return y_BO + b_O


def together(latents_S: Sequence[SparseLatents], W_S: Sequence[Tensor], b_O: Tensor, first_S: list[int]) -> Tensor:
    return grouped_decode(latents_S, W_S, b_O, first_S, b_O.shape[0], backend=BACKEND)


def counted(decode: Callable[..., Tensor], sizes: argparse.Namespace) -> dict[str, float]:
    """Forward and backward of one decode with the gradients of values, weights and bias."""
    P, D, B, L, k = sizes.layers, sizes.width, sizes.tokens, sizes.latents, sizes.k
    latents_S = [
        SparseLatents.from_topk(
            torch.zeros(B, k, dtype=torch.int32), torch.ones(B, k).requires_grad_(), L
        ).with_transpose()
        for _ in range(P)
    ]
    W_S = [torch.empty(L, (P - s) * D).requires_grad_() for s in range(P)]
    b_O, first_S = torch.zeros(P * D).requires_grad_(), [s * D for s in range(P)]
    dy_BO = torch.empty(B, P * D)
    with recorded_launches() as record, Counted() as count:
        decode(latents_S, W_S, b_O, first_S).backward(dy_BO)
    written = sum(
        launch.args[5].nbytes for launch in record if launch.kernel.__name__.endswith("_decode_kernel")
    )  # their argument `y_ptr`
    return {
        "Triton launches": len(record),
        "stock ops": count.n_ops,
        "GB beside the gathers": (count.moved + written) / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, size in (("layers", 12), ("width", 768), ("tokens", 1024), ("latents", 1024), ("k", 32)):
        parser.add_argument(f"--{name}", type=int, default=size)
    sizes = parser.parse_args()
    columns = {"layer by layer": counted(layer_by_layer, sizes), "all at once": counted(together, sizes)}
    print("| | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for name in columns["all at once"]:
        print(f"| {name} | " + " | ".join(f"{column[name]:.4g}" for column in columns.values()) + " |")


if __name__ == "__main__":
    main()
