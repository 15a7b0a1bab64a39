"""Gradients by latent: sorted segments, no atomics. One program owns one row of the gradient and writes it whole.

Axes: B tokens · I, O widths of rows · L latents · N stored entries · T overflow items · S slices of the width.

A latent's entries are cut into items of `ITEM` pairs. Its first item, and every latent without entries, belongs to
program l of the main launch; further items (hot latents only) are summed by an earlier launch into fp32 partials, which
program l then adds in order. There are at most N // ITEM of those, so shapes do not depend on the data.

Gathered rows are read once for each entry: the width is cut into slices, the slice slowest, so that the slice of all
tokens' rows stays in L2. Dot products of slices are summed in fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from crosscode_kernels.sparse import Entries
from crosscode_kernels.triton_common.heuristics import ITEM, segment_config
from crosscode_kernels.triton_common.launch import launch


@triton.jit
def _owner(extra_ptr, item, L):
    """The latent whose overflow items hold `item`: binary search in the ascending counts `extra_ptr[0..L]`."""
    low = item * 0
    high = low + L
    while low < high:
        middle = (low + high) // 2
        if tl.load(extra_ptr + middle + 1) > item:
            high = middle
        else:
            low = middle + 1
    return low


@triton.jit
def with_partials(total, extra_ptr, partial_ptr, latent, offs_o, mask_o, width):
    """A row's sum with those of its latent's overflow items, in order."""
    first_item = tl.load(extra_ptr + latent).to(tl.int64)
    for step in range(0, tl.load(extra_ptr + latent + 1) - first_item):
        total += tl.load(partial_ptr + (first_item + step) * width + offs_o, mask=mask_o, other=0.0)
    return total


@triton.jit
def _segment_rows_kernel(
    order_ptr, token_ptr, latent_ptr, extra_ptr, weight_ptr, rows_ptr, W_ptr, out_ptr, sum_ptr, dot_ptr,
    partial_ptr, partial_sum_ptr, L, N, width, slice_width, OVERFLOW: tl.constexpr,
    HAS_OVERFLOW: tl.constexpr, HAS_OUT: tl.constexpr, HAS_SUM: tl.constexpr, HAS_DOT: tl.constexpr,
    ITEM: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """With HAS_OUT `out[l] = sum_e weight_e rows[token_e]`; with HAS_DOT `dot_e = W[l] . rows[token_e]`, from the same loads."""
    pid = tl.program_id(0)
    if OVERFLOW:
        if pid >= tl.load(extra_ptr + L):
            return
        latent = _owner(extra_ptr, pid, L).to(tl.int64)
        start = tl.load(latent_ptr + latent) + ITEM * (pid - tl.load(extra_ptr + latent) + 1)
    else:
        latent = pid.to(tl.int64)
        start = tl.load(latent_ptr + latent)
    end = tl.minimum(tl.load(latent_ptr + latent + 1), start + ITEM)
    offs_e = tl.arange(0, BLOCK_E)
    offs_block = tl.arange(0, ITEM // BLOCK_E)
    weight_sum = tl.zeros([BLOCK_E], dtype=tl.float32)
    dots = tl.zeros([ITEM // BLOCK_E, BLOCK_E], dtype=tl.float32)
    n_read = tl.where(start < end, width, 0)  # a row of W without entries is not read
    pid_s = tl.program_id(1)
    first_s = pid_s * slice_width
    for first_o in range(first_s, tl.minimum(first_s + slice_width, width), BLOCK_O):
        offs_o = first_o + tl.arange(0, BLOCK_O)
        mask_o = offs_o < width
        acc = tl.zeros([BLOCK_E, BLOCK_O], dtype=tl.float32)
        if HAS_DOT:
            w = tl.load(W_ptr + latent * width + offs_o, mask=offs_o < n_read, other=0.0).to(tl.float32)  # [BLOCK_O]
        for first in range(start, end, BLOCK_E):
            mask_e = first + offs_e < end
            entry = tl.load(order_ptr + first + offs_e, mask=mask_e, other=0)
            token = tl.load(token_ptr + first + offs_e, mask=mask_e, other=0).to(tl.int64)
            weight = tl.load(weight_ptr + entry, mask=mask_e, other=0.0).to(tl.float32)  # [BLOCK_E]
            row = tl.load(
                rows_ptr + token[:, None] * width + offs_o[None, :], mask=mask_e[:, None] & mask_o[None, :], other=0.0
            ).to(tl.float32)  # [BLOCK_E, BLOCK_O]
            if HAS_OUT:
                acc += weight[:, None] * row
            if HAS_SUM:
                weight_sum += tl.where(first_o == first_s, weight, 0.0)
            if HAS_DOT:
                dot = tl.sum(row * w[None, :], 1)
                dots += tl.where(offs_block[:, None] == (first - start) // BLOCK_E, dot[None, :], 0.0)
        if HAS_OUT:
            total = tl.sum(acc, 0)  # [BLOCK_O]
            if OVERFLOW:
                tl.store(partial_ptr + pid.to(tl.int64) * width + offs_o, total, mask=mask_o)
            else:
                if HAS_OVERFLOW:
                    total = with_partials(total, extra_ptr, partial_ptr, latent, offs_o, mask_o, width)
                tl.store(out_ptr + latent * width + offs_o, total, mask=mask_o)
    if HAS_SUM and pid_s == 0:
        total_weight = tl.sum(weight_sum, 0)
        if OVERFLOW:
            tl.store(partial_sum_ptr + pid, total_weight)
        else:
            if HAS_OVERFLOW:
                for item in range(tl.load(extra_ptr + latent), tl.load(extra_ptr + latent + 1)):
                    total_weight += tl.load(partial_sum_ptr + item)
            tl.store(sum_ptr + latent, total_weight)
    if HAS_DOT:
        offs_item = start + offs_block[:, None] * BLOCK_E + offs_e[None, :]  # [ITEM // BLOCK_E, BLOCK_E]
        mask_item = offs_item < end
        entry_item = tl.load(order_ptr + offs_item, mask=mask_item, other=0)
        tl.store(dot_ptr + pid_s.to(tl.int64) * N + entry_item, dots, mask=mask_item)


def token_of_entry(row_ptr_B1: Tensor, n_entries: int) -> Tensor:
    """Token of each entry of a CSR batch, int32, without waiting for the device."""
    position_N = torch.arange(n_entries, dtype=torch.int32, device=row_ptr_B1.device)
    return torch.searchsorted(row_ptr_B1, position_N, right=True, out_int32=True) - 1


def _items(entries: Entries) -> tuple[Tensor, Tensor]:
    """The token of each entry in order of latents, and how many overflow items the latents before each one have."""
    extra_L = (torch.diff(entries.latent_ptr_L1) - 1).clamp_(min=0) // ITEM
    extra_ptr_L1 = torch.nn.functional.pad(torch.cumsum(extra_L, 0, dtype=torch.int32), (1, 0))
    return token_of_entry(entries.row_ptr_B1, entries.order_N.shape[0])[entries.order_N], extra_ptr_L1


def reduce_by_latent(
    entries: Entries,
    rows_BO: Tensor,
    W_LO: Tensor | None,
    *,
    want_out: bool = True,
    want_sum: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`out_LO` of `dtype` (None: that of the rows), the sums of values `sum_L`, where wanted, and `dot_N` with the rows of W
    where that is given."""
    _, _, weight_N, order_N, latent_ptr_L1 = entries
    n_latents, n_entries, width = latent_ptr_L1.shape[0] - 1, order_N.shape[0], rows_BO.shape[1]
    token_N, extra_ptr_L1 = _items(entries)
    n_overflow = n_entries // ITEM
    partial_TO = rows_BO.new_empty(n_overflow if want_out else 0, width, dtype=torch.float32)
    partial_sum_T = rows_BO.new_empty(n_overflow, dtype=torch.float32)
    out_LO = rows_BO.new_empty(n_latents if want_out else 0, width, dtype=dtype or rows_BO.dtype)
    sum_L = rows_BO.new_empty(n_latents if want_sum else 0)
    config = segment_config(rows_BO.shape[0], width, rows_BO.element_size())
    n_slices = triton.cdiv(width, config.slice_width)
    dot_SN = rows_BO.new_zeros(  # padding is in no segment
        n_slices, n_entries if W_LO is not None else 0, dtype=torch.float32 if n_slices > 1 else rows_BO.dtype
    )
    for overflow in (True, False):
        launch(
            _segment_rows_kernel, (n_overflow if overflow else n_latents, n_slices), order_N, token_N, latent_ptr_L1,
            extra_ptr_L1, weight_N, rows_BO, rows_BO if W_LO is None else W_LO, out_LO, sum_L, dot_SN, partial_TO,
            partial_sum_T, n_latents, n_entries, width, config.slice_width, OVERFLOW=overflow,
            HAS_OVERFLOW=n_overflow > 0, HAS_OUT=want_out, HAS_SUM=want_sum, HAS_DOT=W_LO is not None, ITEM=ITEM,
            BLOCK_E=config.BLOCK_E, BLOCK_O=config.BLOCK_O, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    dot_N = dot_SN[0] if n_slices == 1 else dot_SN.sum(0).to(rows_BO.dtype)
    return out_LO, sum_L, dot_N


class RowSums:
    """`segment_rows`, not computed yet: what `row_sum` takes. Its overflow items are summed when they are first asked for."""

    def __init__(self, entries: Entries, rows_BI: Tensor) -> None:
        self.entries, self.rows_BI = entries, rows_BI
        self.token_N, self.extra_ptr_L1 = _items(entries)
        self._partial_TI: Tensor | None = None

    def total(self, dtype: torch.dtype) -> Tensor:
        """`out_LI`."""
        return reduce_by_latent(self.entries, self.rows_BI, None, dtype=dtype)[0]

    def arguments(self) -> tuple[Tensor, ...]:
        """Pointers of `row_sum`."""
        _, _, weight_N, order_N, latent_ptr_L1 = self.entries
        before = (order_N, self.token_N, latent_ptr_L1, self.extra_ptr_L1, weight_N, self.rows_BI)
        if self._partial_TI is None:
            n_tokens, width = self.rows_BI.shape
            n_items, none = order_N.shape[0] // ITEM, self.rows_BI
            self._partial_TI = self.rows_BI.new_empty(n_items, width, dtype=torch.float32)
            config = segment_config(n_tokens, width, none.element_size())
            launch(
                _segment_rows_kernel, (n_items, triton.cdiv(width, config.slice_width)), *before, none, none, none, none,
                self._partial_TI, none, latent_ptr_L1.shape[0] - 1, order_N.shape[0], width, config.slice_width,
                OVERFLOW=True, HAS_OVERFLOW=True, HAS_OUT=True, HAS_SUM=False, HAS_DOT=False, ITEM=ITEM,
                BLOCK_E=config.BLOCK_E, BLOCK_O=config.BLOCK_O, num_warps=config.num_warps,
                num_stages=config.num_stages,
            )  # fmt: skip
        return *before, self._partial_TI


@triton.jit
def row_sum(
    order_ptr, token_ptr, latent_ptr, extra_ptr, weight_ptr, rows_ptr, partial_ptr, latent, offs_o, mask_o, width,
    HAS_OVERFLOW: tl.constexpr, ITEM: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """A tile of one latent's row of `segment_rows`, fp32, as `_segment_rows_kernel` would store it."""
    start = tl.load(latent_ptr + latent)
    end = tl.minimum(tl.load(latent_ptr + latent + 1), start + ITEM)
    offs_e = tl.arange(0, BLOCK_E)
    acc = tl.zeros([BLOCK_E, BLOCK_O], dtype=tl.float32)
    for first in range(start, end, BLOCK_E):
        mask_e = first + offs_e < end
        entry = tl.load(order_ptr + first + offs_e, mask=mask_e, other=0)
        token = tl.load(token_ptr + first + offs_e, mask=mask_e, other=0).to(tl.int64)
        weight = tl.load(weight_ptr + entry, mask=mask_e, other=0.0).to(tl.float32)  # [BLOCK_E]
        row = tl.load(
            rows_ptr + token[:, None] * width + offs_o[None, :], mask=mask_e[:, None] & mask_o[None, :], other=0.0
        )  # [BLOCK_E, BLOCK_O]
        acc += weight[:, None] * row.to(tl.float32)
    total = tl.sum(acc, 0)  # [BLOCK_O]
    if HAS_OVERFLOW:
        total = with_partials(total, extra_ptr, partial_ptr, latent, offs_o, mask_o, width)
    return total


def latent_order(latent_idx_N: Tensor, n_latents: int) -> tuple[Tensor, Tensor]:
    sorted_N, order_N = torch.sort(latent_idx_N, stable=True)
    bound_L1 = torch.arange(n_latents + 1, dtype=torch.int32, device=latent_idx_N.device)
    return order_N.int(), torch.searchsorted(sorted_N, bound_L1, out_int32=True)


def segment_rows(entries: Entries, rows_BI: Tensor) -> tuple[Tensor, Tensor]:
    out_LI, sum_L, _ = reduce_by_latent(entries, rows_BI, None, want_sum=True)
    return out_LI, sum_L
