"""Threshold encode for inference: tokens are encoded in chunks, whose kept entries are counted, then written.

Axes: B tokens · I input width · L latents · N kept entries.

How many entries are kept depends on the data, so this waits for the device once per chunk; nothing `B x L` is made. It
has no gradient: the door serves who asks for one with stock ops.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from crosscode_kernels.encoder import Encoder
from crosscode_kernels.selection.triton_impl import preacts, token_chunks
from crosscode_kernels.sparse import SparseLatents
from crosscode_kernels.triton_common.heuristics import elementwise_config
from crosscode_kernels.triton_common.launch import launch
from crosscode_kernels.triton_common.primitives import relu_nan


@triton.jit
def _threshold_kernel(
    h_ptr, threshold_ptr, scale_ptr, row_ptr, count_ptr, idx_ptr, value_ptr, L, STORE: tl.constexpr,
    HAS_SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row by row: how many entries are kept; with STORE their columns, ascending, and values, from `row_ptr` on."""
    pid_b = tl.program_id(0).to(tl.int64)
    threshold = tl.load(threshold_ptr)
    kept = tl.zeros([BLOCK], dtype=tl.int32)
    position = pid_b * 0
    if STORE:
        position = tl.load(row_ptr + pid_b)
    for first in range(0, L, BLOCK):
        column = first + tl.arange(0, BLOCK)
        a = relu_nan(tl.load(h_ptr + pid_b * L + column, mask=column < L, other=0.0).to(tl.float32))
        rank = a
        if HAS_SCALE:
            rank = a * tl.load(scale_ptr + column, mask=column < L, other=0.0).to(tl.float32)
        # Written as "not below", so that NaN is kept and seen.
        dropped = (a <= 0.0) | (rank < threshold) | (column >= L)
        take = tl.where(dropped, 0, 1)
        if STORE:
            slot = position + tl.cumsum(take, 0) - take
            tl.store(idx_ptr + slot, column, mask=take > 0)
            tl.store(value_ptr + slot, a, mask=take > 0)
            position += tl.sum(take, 0)
        else:
            kept += take
    if not STORE:
        tl.store(count_ptr + pid_b, tl.sum(kept, 0))


def _launch(
    h_BL: Tensor, threshold: Tensor, scale_L: Tensor | None, outputs: tuple[Tensor, Tensor, Tensor, Tensor], store: bool
) -> None:
    # The comparison is done in the dtype of h where there is no scale.
    threshold = threshold.to(h_BL.dtype if scale_L is None else torch.float32).float()
    config = elementwise_config(h_BL.shape[1])
    launch(
        _threshold_kernel, (h_BL.shape[0],), h_BL, threshold, h_BL if scale_L is None else scale_L.contiguous(),
        *outputs, h_BL.shape[1], STORE=store, HAS_SCALE=scale_L is not None, BLOCK=config.BLOCK,
        num_warps=config.num_warps,
    )  # fmt: skip


def kept_counts(h_BL: Tensor, threshold: Tensor, scale_L: Tensor | None) -> Tensor:
    """How many entries of each row are positive and, scaled, not below the threshold; int32."""
    count_B = h_BL.new_empty(h_BL.shape[0], dtype=torch.int32)
    _launch(h_BL, threshold, scale_L, (count_B, count_B, count_B, h_BL), False)
    return count_B


def kept_entries(
    h_BL: Tensor, threshold: Tensor, scale_L: Tensor | None, count_B: Tensor, n_kept: int
) -> tuple[Tensor, Tensor]:
    """`(column_N int32, value_N)` of these entries, row after row; `n_kept` is the sum of `count_B`."""
    row_ptr_B1 = torch.nn.functional.pad(torch.cumsum(count_B, 0), (1, 0))
    column_N, value_N = count_B.new_empty(n_kept), h_BL.new_empty(n_kept)
    _launch(h_BL, threshold, scale_L, (row_ptr_B1, count_B, column_N, value_N), True)
    return column_N, value_N


def encode_threshold(encoder: Encoder, threshold: Tensor, rank_scale_L: Tensor | None) -> SparseLatents:
    """No gradient. At least one token."""
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for chunk in token_chunks(encoder.x_BI.shape[0], encoder.W_enc_LI.shape[0]):
        h_BL = preacts(encoder._replace(x_BI=encoder.x_BI[chunk]))
        count_B = kept_counts(h_BL, threshold, rank_scale_L)
        parts.append((count_B, *kept_entries(h_BL, threshold, rank_scale_L, count_B, int(count_B.sum()))))
    count_B, column_N, value_N = (torch.cat(part) for part in zip(*parts, strict=True))
    row_ptr_B1 = torch.nn.functional.pad(torch.cumsum(count_B, 0, dtype=torch.int32), (1, 0))
    return SparseLatents(row_ptr_B1, column_N, value_N, encoder.W_enc_LI.shape[0])
