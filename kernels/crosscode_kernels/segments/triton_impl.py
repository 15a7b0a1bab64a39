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

from crosscode_kernels.segments.triton_groups import Groups, group_of
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
def _item_sum(
    order_ptr, token_ptr, weight_ptr, rows_ptr, w, weight_sum, dots, is_first, start, end, offs_o, mask_o, width,
    HAS_OUT: tl.constexpr, HAS_SUM: tl.constexpr, HAS_DOT: tl.constexpr, ITEM: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Over a tile of columns: the sum of entries `start` to `end`. Added to: the sum of their weights where the tile `is_first`,
    and their dots with `w`."""
    acc = tl.zeros([BLOCK_E, BLOCK_O], dtype=tl.float32)
    offs_e = tl.arange(0, BLOCK_E)
    offs_block = tl.arange(0, ITEM // BLOCK_E)
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
            weight_sum += tl.where(is_first, weight, 0.0)
        if HAS_DOT:
            dot = tl.sum(row * w[None, :], 1)
            dots += tl.where(offs_block[:, None] == (first - start) // BLOCK_E, dot[None, :], 0.0)
    return tl.sum(acc, 0), weight_sum, dots


@triton.jit
def row_sum(
    order_ptr, token_ptr, latent_ptr, extra_ptr, weight_ptr, rows_ptr, partial_ptr, latent, offs_o, mask_o, width,
    HAS_OVERFLOW: tl.constexpr, ITEM: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """A tile of one latent's row of `segment_rows`, fp32, as `_segment_rows_kernel` would store it."""
    start = tl.load(latent_ptr + latent)
    end = tl.minimum(tl.load(latent_ptr + latent + 1), start + ITEM)
    total, _, _ = _item_sum(
        order_ptr, token_ptr, weight_ptr, rows_ptr, 0.0, 0.0, 0.0, False, start, end, offs_o, mask_o, width, True,
        False, False, ITEM, BLOCK_E, BLOCK_O,
    )  # [BLOCK_O]  # fmt: skip
    if HAS_OVERFLOW:
        total = with_partials(total, extra_ptr, partial_ptr, latent, offs_o, mask_o, width)
    return total


@triton.jit
def _segment_rows_kernel(
    order_ptr, token_ptr, latent_ptr, extra_ptr, weight_ptr, rows_ptr, W_ptr, out_ptr, sum_ptr, dot_ptr,
    partial_ptr, partial_sum_ptr, table_ptr, L, N, n_columns, n_rows, slice_width, OVERFLOW: tl.constexpr,
    HAS_OVERFLOW: tl.constexpr, HAS_OUT: tl.constexpr, HAS_SUM: tl.constexpr, HAS_DOT: tl.constexpr,
    ITEM: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_O: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """With HAS_OUT `out[l] = sum_e weight_e rows[token_e]`; with HAS_DOT `dot_e = W[l] . rows[token_e]`, from the same loads.
    With ALIGN latents are those of groups, `n_rows` of each (the last one for padding); see `Groups`."""
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
    width = n_columns
    row = latent
    if ALIGN > 0:
        group = latent // n_rows
        row = latent - group * n_rows
        if row == n_rows - 1:
            return
        first_entry, W_offset, first_column, width, out_offset = group_of(table_ptr, group, ALIGN)
        W_ptr += W_offset
        out_ptr += out_offset
        rows_ptr += first_column
        order_ptr += first_entry
        token_ptr += first_entry
        weight_ptr += first_entry
        dot_ptr += first_entry
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
        w = tl.zeros([BLOCK_O], dtype=tl.float32)
        if HAS_DOT:
            w = tl.load(W_ptr + row * width + offs_o, mask=offs_o < n_read, other=0.0).to(tl.float32)  # [BLOCK_O]
        total, weight_sum, dots = _item_sum(
            order_ptr, token_ptr, weight_ptr, rows_ptr, w, weight_sum, dots, first_o == first_s, start, end, offs_o,
            mask_o, n_columns, HAS_OUT, HAS_SUM, HAS_DOT, ITEM, BLOCK_E, BLOCK_O,
        )  # fmt: skip
        if HAS_OUT:
            if OVERFLOW:
                tl.store(partial_ptr + pid.to(tl.int64) * n_columns + offs_o, total, mask=mask_o)
            else:
                if HAS_OVERFLOW:
                    total = with_partials(total, extra_ptr, partial_ptr, latent, offs_o, mask_o, n_columns)
                tl.store(out_ptr + row * width + offs_o, total, mask=mask_o)
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


def _items(entries: Entries, groups: Groups | None) -> tuple[Tensor, Tensor]:
    """The token of each entry in order of latents, and how many overflow items the latents before each one have."""
    extra_L = (torch.diff(entries.latent_ptr_L1) - 1).clamp_(min=0) // ITEM
    extra_ptr_L1 = torch.nn.functional.pad(torch.cumsum(extra_L, 0, dtype=torch.int32), (1, 0))
    row_ptr_B1, order_N = entries.row_ptr_B1, entries.order_N
    if groups is None:
        return token_of_entry(row_ptr_B1, order_N.shape[0])[order_N], extra_ptr_L1
    first_entry_S = groups.table_S5[:, 0].int()
    row_ptr_SB1 = row_ptr_B1.view(len(groups.W_S), -1)
    row_N = token_of_entry((row_ptr_SB1 + first_entry_S[:, None]).flatten(), order_N.shape[0])
    group_N, token_N = row_N // row_ptr_SB1.shape[1], row_N % row_ptr_SB1.shape[1]
    return token_N[order_N + first_entry_S[group_N]], extra_ptr_L1


class RowSums:
    """`segment_rows`, not computed yet: what `row_sum` takes. Its overflow items are summed when they are first asked for."""

    def __init__(self, entries: Entries, rows_BI: Tensor, groups: Groups | None = None) -> None:
        self.entries, self.rows_BI, self.groups = entries, rows_BI, groups
        self.token_N, self.extra_ptr_L1 = _items(entries, groups)
        self.n_overflow = entries.order_N.shape[0] // ITEM
        self._partial_TI: Tensor | None = None

    def total(self, dtype: torch.dtype) -> Tensor:
        """`out_LI`."""
        return reduce_by_latent(self.entries, self.rows_BI, None, dtype=dtype)[0]

    def arguments(self) -> tuple[Tensor, ...]:
        """Pointers of `row_sum`."""
        if self._partial_TI is None:
            self._partial_TI = self.new_partials()
            self.launch(True, self._partial_TI)
        return *self._pointers(), self._partial_TI

    def new_partials(self) -> Tensor:
        return self.rows_BI.new_empty(self.n_overflow, self.rows_BI.shape[1], dtype=torch.float32)

    def _pointers(self) -> tuple[Tensor, ...]:
        _, _, weight_N, order_N, latent_ptr_L1 = self.entries
        return order_N, self.token_N, latent_ptr_L1, self.extra_ptr_L1, weight_N, self.rows_BI

    def launch(
        self, overflow: bool, partial_TI: Tensor | None, out_LI: Tensor | None = None, *, W_LI: Tensor | None = None,
        dot_SN: Tensor | None = None, sum_L: Tensor | None = None, partial_sum_T: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Overflow items into partials, or rows into what is given: sums of rows, of weights, dots with the rows of W."""
        none, (n_tokens, n_columns), groups = self.rows_BI, self.rows_BI.shape, self.groups
        n_latents = self.entries.latent_ptr_L1.shape[0] - 1
        width = n_columns if groups is None else groups.widest
        config = segment_config(n_tokens, width, none.element_size())
        given = (none if one is None else one for one in (W_LI, out_LI, sum_L, dot_SN, partial_TI, partial_sum_T))
        launch(
            _segment_rows_kernel,
            (self.n_overflow if overflow else n_latents, triton.cdiv(width, config.slice_width)), *self._pointers(),
            *given, none if groups is None else groups.table_S5, n_latents, self.entries.order_N.shape[0], n_columns,
            0 if groups is None else groups.n_latents + 1, config.slice_width, OVERFLOW=overflow,
            HAS_OVERFLOW=self.n_overflow > 0, HAS_OUT=partial_TI is not None, HAS_SUM=sum_L is not None,
            HAS_DOT=W_LI is not None, ITEM=ITEM, BLOCK_E=config.BLOCK_E, BLOCK_O=config.BLOCK_O,
            ALIGN=0 if groups is None else groups.align, num_warps=config.num_warps, num_stages=config.num_stages,
            reaches=groups.W_S if groups else (),
        )  # fmt: skip


def reduce_by_latent(
    entries: Entries,
    rows_BO: Tensor,
    W_LO: Tensor | None,
    *,
    want_out: bool = True,
    want_sum: bool = False,
    dtype: torch.dtype | None = None,
    groups: Groups | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`out_LO` of `dtype` (None: that of the rows), the sums of values `sum_L`, where wanted, and `dot_N` with the rows of W
    where that is given. Of `groups`, with the first one's W: the outputs of all in one array, and no sums of values."""
    n_latents, width = entries.latent_ptr_L1.shape[0] - 1, rows_BO.shape[1] if groups is None else groups.widest
    sums, out_shape = RowSums(entries, rows_BO, groups), (n_latents, width) if groups is None else (groups.n_weights,)
    out_LO = rows_BO.new_empty(*(out_shape if want_out else (0,)), dtype=dtype or rows_BO.dtype)
    sum_L, partial_TO = rows_BO.new_empty(n_latents if want_sum else 0), sums.new_partials() if want_out else None
    partial_sum_T = rows_BO.new_empty(sums.n_overflow, dtype=torch.float32)
    n_slices = triton.cdiv(width, segment_config(rows_BO.shape[0], width, rows_BO.element_size()).slice_width)
    dot_SN = rows_BO.new_zeros(  # padding is in no segment
        n_slices, entries.order_N.shape[0] if W_LO is not None else 0,
        dtype=torch.float32 if n_slices > 1 else rows_BO.dtype,
    )  # fmt: skip
    for overflow in (True, False):
        sums.launch(
            overflow, partial_TO, out_LO, W_LI=W_LO, dot_SN=dot_SN, sum_L=sum_L if want_sum else None,
            partial_sum_T=partial_sum_T,
        )  # fmt: skip
    dot_N = dot_SN[0] if n_slices == 1 else dot_SN.sum(0).to(rows_BO.dtype)
    return out_LO, sum_L, dot_N


def latent_order(latent_idx_N: Tensor, n_latents: int) -> tuple[Tensor, Tensor]:
    sorted_N, order_N = torch.sort(latent_idx_N, stable=True)
    bound_L1 = torch.arange(n_latents + 1, dtype=torch.int32, device=latent_idx_N.device)
    return order_N.int(), torch.searchsorted(sorted_N, bound_L1, out_int32=True)


def segment_rows(entries: Entries, rows_BI: Tensor) -> tuple[Tensor, Tensor]:
    out_LI, sum_L, _ = reduce_by_latent(entries, rows_BI, None, want_sum=True)
    return out_LI, sum_L
