"""Bytes that the torch backend's kernels really move, counted op by op, beside the traffic model's fewest.

    python benches/counted_bytes.py [--out benches/results]

No implementation moves less than the fewest bytes of its inputs and outputs: counts below the model's would show a
mistake in its arithmetic. Counts far above it are passes that stock ops make and fused kernels do not.

Axes: B tokens · I flattened input dims · L latents · N stored entries · k entries per token.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from crosscode_kernels.encoder import Encoder
from crosscode_kernels.registration import kernel_of
from static_tensors import CASES, Case, Tensors
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from traffic_model import DEVICES, Model

aten = torch.ops.aten
ALLOCATIONS = {aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.resize_}
GATHERS: dict[Any, dict[int, int]] = {
    aten._embedding_bag_forward_only: {0: 1},
    aten._embedding_bag_per_sample_weights_backward: {0: 4, 1: 2},
    aten.index_select: {0: 2},
}
"""Of ops that read rows of a matrix by index: the argument that is the matrix, and the argument that holds the indices."""


class CountedBytes(TorchDispatchMode):
    """Within this mode `moved` grows by what each op reads and writes, and `of_weights`, by the op's name, by what of that are
    ops on tensors of at least `weight` numbers. Views are free; of a matrix that is gathered from, the rows that are named
    count, once each; an `out` argument is written, not read."""

    def __init__(self, weight: int = 0) -> None:
        super().__init__()
        self.moved, self.weight, self.of_weights = 0, weight, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not {Tensor, torch.nn.Parameter}.issuperset(
            types
        ):  # of a gradient that is not computed: what that does counts
            return NotImplemented
        before, out = self.moved, func(*args, **(kwargs or {}))
        self._count(func, args, kwargs, out)
        tensors = [leaf for leaf in tree_leaves((args, out)) if isinstance(leaf, Tensor)]
        if self.moved > before and any(tensor.numel() >= self.weight for tensor in tensors):
            self.of_weights[str(func.overloadpacket)] += self.moved - before
        return out

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        if func.overloadpacket in ALLOCATIONS:
            return
        written = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        inputs = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        if any(leaf.layout != torch.strided for leaf in (*written, *inputs)):
            if func.overloadpacket in (aten.addmm, aten.addmm_):
                self.moved += _sparse_product_bytes(*args[:3], (kwargs or {}).get("beta", 1), out)
            elif func.overloadpacket is aten.sparse_sampled_addmm:
                self.moved += _sampled_product_bytes(*args[:3])
            return  # everything else puts a sparse tensor together, or takes it apart
        storages = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        if not func._schema.is_mutable and all(one.untyped_storage().data_ptr() in storages for one in written):
            return
        gathered = GATHERS.get(func.overloadpacket, {})
        for place, value in enumerate(args):
            if func.overloadpacket is aten.gather and place == 0:  # single numbers, not rows
                self.moved += args[2].numel() * value.element_size()
            elif place in gathered:
                rows = args[gathered[place]].unique().numel()
                self.moved += rows * _bytes(value) // max(value.shape[0], 1)
            else:
                self.moved += sum(_bytes(leaf) for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
        if func._schema.is_mutable and not written:  # on lists of tensors, in place
            written = [
                leaf
                for value, argument in zip(args, func._schema.arguments, strict=False)
                if argument.alias_info is not None and argument.alias_info.is_write
                for leaf in tree_leaves(value)
            ]
        self.moved += sum(map(_bytes, written))


def _sparse_product_bytes(added: Tensor, sparse: Tensor, rows: Tensor, beta: float, out: Tensor) -> int:
    """Of `out = beta * added + sparse @ rows`: the entries, the rows that they name, and what is added unless beta is 0."""
    entries = (sparse.crow_indices(), sparse.col_indices(), sparse.values())
    named = entries[1].unique().numel() * _bytes(rows) // max(rows.shape[0], 1)
    return sum(map(_bytes, entries)) + named + _bytes(out) + (_bytes(added) if beta else 0)


def _sampled_product_bytes(pairs: Tensor, rows: Tensor, columns: Tensor) -> int:
    """Of `rows @ columns` at the entries of `pairs`: these, the rows and columns that they name, and the values."""
    row_ptr, column_idx, value_N = pairs.crow_indices(), pairs.col_indices(), pairs.values()
    named = int((row_ptr.diff() > 0).sum()) * rows.shape[1] + column_idx.unique().numel() * columns.shape[0]
    return sum(map(_bytes, (row_ptr, column_idx, value_N))) + named * rows.element_size()


def _bytes(tensor: Tensor) -> int:
    """Of the elements that are there: a broadcast dimension is one."""
    n = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        n *= size if stride else min(size, 1)
    return n * tensor.element_size()


def counted(case: Case, dtype: torch.dtype = torch.float32) -> dict[str, tuple[float, int]]:
    """By op: the model's fewest bytes, and the counted ones. Latents uniformly popular, as in the model."""
    t = Tensors(case, dtype, "cpu")
    generator = torch.Generator().manual_seed(0)
    t.idx_N = torch.rand(case.n_tokens, case.n_latents, generator=generator).topk(case.k).indices.int().view(-1)
    t.order = kernel_of("latent_order", "torch")(t.idx_N, case.n_latents)
    model = Model(case, dtype, DEVICES[0])
    entries = t.entries
    norms = (t.norms_LX, t.n_L)
    calls: dict[str, tuple[float, Callable[[], Any]]] = {
        "encode GEMM": (model.preacts().fewest, lambda: torch.nn.functional.linear(t.x_BI, t.W_enc_LI, t.b_enc_L)),
        "GEMM and row top-k": (
            model.preacts().fewest + model.row_select().fewest,
            lambda: kernel_of("encode_topk", "torch")(Encoder(t.x_BI, t.W_enc_LI, t.b_enc_L), case.k),
        ),
    }

    def add(name: str, fewest: float, op: str, *arguments: Any) -> None:
        calls[name] = fewest, lambda: kernel_of(op, "torch")(*arguments)

    add("decode", model.decode(False).fewest, "sparse_decode", entries, t.W_dec_LO, t.b_dec_O)
    backward = "sparse_decode_backward"
    add("decode backward", model.decode_backward().fewest, backward, entries, t.y_BO, t.W_dec_LO)
    add("encode weight gradient", model.encode_backward().fewest, "segment_rows", entries, t.x_BI)
    add("decoder norms", model.norms().fewest, "decoder_norms", t.W_dec_LO, t.segments, False)
    add(
        "decoder norms backward", model.norms_backward().fewest, "decoder_norms_backward",
        t.norms_LX, t.lambda_L, t.W_dec_LO, *norms, t.segments, False,
    )  # fmt: skip
    add("recon loss", model.recon().fewest, "recon_loss", t.y_BO, t.target_BO, t.segments)
    add("recon loss backward", model.recon_backward().fewest, "recon_loss_backward", t.g_X, t.y_BO, t.segments)
    add("JumpReLU", model.jumprelu().fewest, "jumprelu", t.h_BL, t.t_L)
    add("JumpReLU backward", model.jumprelu_backward().fewest, "jumprelu_backward", t.da_BL, t.h_BL, t.t_L, 2.0, False)
    add("sparse penalty", model.sparse_penalty().fewest, "sparse_penalty", entries, t.n_L, t.lambda_L, None)
    found = {}
    for name, (fewest, run) in calls.items():
        with CountedBytes() as count:
            run()
        found[name] = fewest, count.moved
    return found


def table(case: Case) -> str:
    """Markdown."""
    lines = [
        "# Bytes of the torch backend, counted", "",
        f"B={case.n_tokens}, I={case.input_width}, O={case.output_width}, L={case.n_latents}, k={case.k}, float32, CPU. A "
        "count, not a prediction: a dispatch mode adds up what each stock op reads and writes. Caches are left out, so "
        "that elementwise passes over blocks that stay in them count in full.", "",
        "| op | fewest MB (model) | counted MB | ratio |", "|---|---|---|---|",
    ]  # fmt: skip
    for name, (fewest, moved) in counted(case).items():
        lines.append(f"| {name} | {fewest / 1e6:.1f} | {moved / 1e6:.1f} | {moved / fewest:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    text = table(next(case for case in CASES if case.name == "cpu-bench"))
    print(text)
    (out / "counted_bytes.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
