"""Matrices with more than 2**31 elements: addresses do not wrap.

Memory is reserved, not used: only the pages of the rows that are touched become real. Kernels are not run on the whole
grid but at chosen programs, with the arguments that their host functions would hand them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

WIDTH = 256
ROWS = 2**31 // WIDTH + 77
"""ROWS x WIDTH half-precision numbers: 4.3 GB of addresses."""


@pytest.fixture
def huge_rows() -> Tensor:
    try:
        return torch.empty(ROWS, WIDTH, dtype=torch.float16)
    except RuntimeError as error:
        pytest.skip(f"the system does not reserve 4.3 GB of addresses: {error}")


@pytest.fixture
def run_at(monkeypatch) -> Callable[..., None]:
    """`run_at(call, kernel_name, index)`: run one program of each launch of that kernel that `call` asks for."""
    from crosscode_kernels.triton_common.launch import recorded_launches
    from triton.runtime.interpreter import InterpreterBuilder

    def run(call, kernel_name, index, keep=lambda launch: True):
        with recorded_launches() as record:
            result = call()
        launches = [one for one in record if one.kernel.__name__ == kernel_name and keep(one)]
        assert launches
        for launch in launches:
            assert all(place < size for place, size in zip(index, launch.grid, strict=False))
            with monkeypatch.context() as patch:
                patch.setattr(
                    InterpreterBuilder, "set_grid_idx", lambda self, x, y, z: setattr(self, "grid_idx", index)
                )
                patch.setattr(
                    InterpreterBuilder, "set_grid_dim", lambda self, *dims, g=launch.grid: setattr(
                        self, "grid_dim", (*g, 1, 1)[:3]
                    )
                )  # fmt: skip
                launch.kernel[(1,)](*launch.args, **launch.meta)
        return result

    return run


def row(seed, width=WIDTH):
    return torch.randn(width, generator=torch.Generator().manual_seed(seed)).half()


def test_decode_gathers_the_last_row(huge_rows):
    from crosscode_kernels.sparse import SparseLatents
    from crosscode_kernels.sparse_decode.triton_impl import gather_dot, sparse_decode

    huge_rows[-1] = row(0)
    row_ptr_B1 = torch.tensor([0, 1], dtype=torch.int32)
    idx_N = torch.tensor([ROWS - 1], dtype=torch.int32)
    entries = SparseLatents(row_ptr_B1, idx_N, torch.tensor([2.0]).half(), ROWS).entries(None)
    y_BO = sparse_decode(entries, huge_rows, None)
    torch.testing.assert_close(y_BO[0], 2 * row(0))
    dot_N = gather_dot(entries, row(1).unsqueeze(0), huge_rows)
    torch.testing.assert_close(dot_N[0].float(), row(0).float() @ row(1).float(), rtol=1e-3, atol=1e-3)


def test_the_last_row_of_a_weight_gradient(huge_rows, run_at, monkeypatch):
    from crosscode_kernels.segments import triton_impl
    from crosscode_kernels.sparse import Entries

    # The output is as large as the weights: it is taken from the same reserved memory.
    monkeypatch.setattr(Tensor, "new_empty", _new_empty_or(huge_rows), raising=True)
    latent_ptr_L1 = torch.zeros(ROWS + 1, dtype=torch.int32)
    latent_ptr_L1[-1] = 2
    order_N = torch.tensor([0, 1], dtype=torch.int32)
    row_ptr_B1 = torch.tensor([0, 1, 2], dtype=torch.int32)
    weight_N = torch.tensor([0.5, 2.0]).half()
    rows_BI = torch.stack([row(0), row(1)])
    huge_rows[-2:] = torch.nan
    out_LI, sum_L = run_at(
        lambda: triton_impl.segment_rows(Entries(row_ptr_B1, order_N, weight_N, order_N, latent_ptr_L1), rows_BI),
        "_segment_rows_kernel",
        (ROWS - 1, 0, 0),
    )
    torch.testing.assert_close(out_LI[-1], 0.5 * row(0) + 2 * row(1), rtol=2e-3, atol=2e-3)
    assert sum_L[-1] == 2.5
    assert out_LI[-2].isnan().all()


def _new_empty_or(huge):
    plain = Tensor.new_empty

    def new_empty(self, *shape, **options):
        return huge if tuple(shape) == tuple(huge.shape) else plain(self, *shape, **options)

    return new_empty


def test_select_reads_the_last_row(huge_rows, run_at):
    from crosscode_kernels.encode_groupmax.triton_impl import group_max
    from crosscode_kernels.selection.triton_impl import row_topk

    huge_rows[-1] = row(0)
    idx_BK, value_BK = run_at(lambda: row_topk(huge_rows, 2), "_row_select_kernel", (ROWS - 1, 0, 0))
    best = row(0).topk(2).indices.sort().values
    assert idx_BK[-1].tolist() == best.tolist() and torch.equal(value_BK[-1], row(0)[best])
    idx_BK, value_BK = run_at(lambda: group_max(huge_rows, 1), "_groupmax_kernel", (ROWS - 1, 0, 0))
    assert idx_BK[-1].item() == row(0).argmax() and value_BK[-1] == row(0).max()


def test_batch_select_reads_and_writes_the_last_row(huge_rows, run_at):
    from crosscode_kernels.selection.triton_batch import batch_topk

    huge_rows[-1] = row(0)
    # An empty histogram puts the threshold at 0, so that the row counts its positive entries as above it.
    above = []
    run_at(
        lambda: batch_topk(huge_rows, 2), "_row_counts_kernel", (ROWS - 1, 0, 0),
        keep=lambda one: above.append(one.args[6]) is None,
    )  # fmt: skip
    assert above[0][-1] == (row(0) > 0).sum()


def test_dense_kernels_reach_the_last_row(huge_rows, run_at):
    from crosscode_kernels.recon_loss.triton_impl import recon_loss_backward
    from crosscode_kernels.triton_common.dense import dense_forward
    from crosscode_kernels.triton_common.heuristics import dense_config

    per_split = dense_config(ROWS, WIDTH, huge_rows.element_size()).rows_per_split
    last_split = (ROWS - 1) // per_split
    huge_rows[last_split * per_split :] = 0
    huge_rows[-1] = row(0)
    n_L = torch.ones(WIDTH)
    partial = []
    run_at(
        lambda: dense_forward(huge_rows, n_L=n_L, lambda_L=n_L, l1=True), "_dense_fwd_kernel", (0, last_split, 0),
        keep=lambda one: partial.append(one.args[6]) is None,
    )  # fmt: skip
    torch.testing.assert_close(partial[0][last_split, 0], row(0).float().sum())
    dy_BO = run_at(
        lambda: recon_loss_backward(torch.ones(1), huge_rows, [WIDTH]), "_recon_loss_bwd_kernel", (ROWS - 1, 0, 0)
    )
    torch.testing.assert_close(dy_BO[-1].float(), 2 / ROWS * row(0).float(), rtol=1e-2, atol=1e-7)


def test_norms_of_the_last_row(huge_rows, run_at):
    from crosscode_kernels.decoder_norms.triton_impl import decoder_norms
    from crosscode_kernels.triton_common.heuristics import norms_config

    huge_rows[-8:] = 0
    huge_rows[-1] = row(0)
    last = (ROWS - 1) // norms_config(WIDTH).BLOCK_L
    norms = []
    run_at(
        lambda: decoder_norms(huge_rows, [WIDTH], True), "_decoder_norms_fwd_kernel", (last, 0, 0),
        keep=lambda one: norms.append(one.args[1]) is None,
    )  # fmt: skip
    torch.testing.assert_close(norms[0][-1, 0], row(0).float().norm())
