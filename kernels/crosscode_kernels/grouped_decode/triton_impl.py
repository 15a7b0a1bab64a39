"""grouped_decode: a program owns a tile of a token's output and walks the entries of each dictionary that writes there.

Axes: B tokens · S dictionaries · O columns of the output · L latents of each · N stored entries of all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor, cuda

from crosscode_kernels.segments.triton_groups import Groups, group_of
from crosscode_kernels.segments.triton_impl import reduce_by_latent
from crosscode_kernels.sparse import Entries
from crosscode_kernels.sparse_decode.triton_impl import gather_sum
from crosscode_kernels.triton_common.heuristics import ITEM, decode_config
from crosscode_kernels.triton_common.launch import launch

MOST_PARTIALS = 2**28
"""Bytes of partial sums of hot latents in a launch of the backward."""


@triton.jit
def _grouped_decode_kernel(
    row_ptr, idx_ptr, value_ptr, W_ptr, b_ptr, y_ptr, table_ptr, n_rows, n_groups, n_out, HAS_BIAS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """`n_rows`: bounds of each dictionary's batch, one more than tokens. Of W_ptr only what the table says is read."""
    pid_b = tl.program_id(0).to(tl.int64)
    first_o = tl.program_id(1) * BLOCK_O
    offs_o = first_o + tl.arange(0, BLOCK_O)
    y = tl.zeros([BLOCK_O], dtype=tl.float32)
    for group in range(0, n_groups):
        first_entry, W_offset, first_column, width, _ = group_of(table_ptr, group, ALIGN)
        if (first_o < first_column + width) & (first_o + BLOCK_O > first_column):
            offs_w = offs_o - first_column
            y += gather_sum(
                row_ptr + group * n_rows, idx_ptr + first_entry, value_ptr + first_entry, W_ptr + W_offset, pid_b, offs_w,
                (offs_w >= 0) & (offs_w < width), width, BLOCK_K, BLOCK_O,
            )  # [BLOCK_O]  # fmt: skip
    mask_o = offs_o < n_out
    if HAS_BIAS:
        y += tl.load(b_ptr + offs_o, mask=mask_o, other=0.0).to(tl.float32)
    tl.store(y_ptr + pid_b * n_out + offs_o, y, mask=mask_o)


_Rows = tuple[tuple[int, ...], ...]
_tables: dict[tuple[_Rows, torch.device], Tensor] = {}
_tables_of_graphs: dict[tuple[_Rows, torch.device], Tensor] = {}
_MOST_TABLES = 64


def _table(rows_S5: _Rows, device: torch.device) -> Tensor:
    """On the device. Kept, as weights stay where they are: a step copies nothing; and where it does, it waits for nothing.
    For good where a captured graph reads it, which must find it made: a replay would copy memory that is another's by then."""
    key = rows_S5, device
    if device.type == "cuda" and cuda.is_current_stream_capturing():
        if key not in _tables:
            raise RuntimeError("grouped_decode: decoders lie elsewhere at each step")
        return _tables_of_graphs.setdefault(key, _tables[key])
    if key not in _tables:
        if len(_tables) >= _MOST_TABLES:
            del _tables[next(iter(_tables))]
        table_S5 = torch.tensor(rows_S5, dtype=torch.int64)
        if device.type == "cuda":
            table_S5 = table_S5.pin_memory()
        _tables[key] = table_S5.to(device, non_blocking=True)
    return _tables[key]


def groups_of(count_S: Sequence[int], W_S: Sequence[Tensor], first_S: Sequence[int]) -> Groups:
    """Where the entries, weights, windows and gradients of each dictionary lie."""
    size = W_S[0].element_size()
    place_S = [(W_LO.data_ptr() - W_S[0].data_ptr()) // size for W_LO in W_S]
    width_S = [W_LO.shape[1] for W_LO in W_S]
    entry_S1, out_S1 = (list(accumulate(sizes, initial=0)) for sizes in (count_S, [W_LO.numel() for W_LO in W_S]))
    rows = tuple(zip(entry_S1, place_S, first_S, width_S, out_S1, strict=False))
    align = math.gcd(16, *(number for row in rows for number in row[1:]))
    table_S5 = _table(rows, W_S[0].device)
    return Groups(table_S5, W_S[0].shape[0], max(width_S), out_S1[-1], align, W_S)


def grouped_decode(
    entries: Entries, count_S: list[int], W_S: list[Tensor], b_O: Tensor | None, first_S: list[int], n_out: int
) -> Tensor:
    groups, n_rows = groups_of(count_S, W_S, first_S), entries.row_ptr_B1.shape[0] // len(W_S)
    y_BO = entries.value_N.new_empty(n_rows - 1, n_out)
    config = decode_config(groups.n_latents * len(W_S), n_out, y_BO.element_size())
    launch(
        _grouped_decode_kernel, (n_rows - 1, triton.cdiv(n_out, config.BLOCK_O)), *entries[:3], W_S[0],
        W_S[0] if b_O is None else b_O, y_BO, groups.table_S5, n_rows, len(W_S), n_out, HAS_BIAS=b_O is not None,
        BLOCK_K=config.BLOCK_K, BLOCK_O=config.BLOCK_O, ALIGN=groups.align, num_warps=config.num_warps,
        num_stages=config.num_stages, reaches=W_S,
    )  # fmt: skip
    return y_BO


def runs_within_memory(count_S: Sequence[int], n_out: int) -> list[slice]:
    """Neighbouring dictionaries that one launch serves: as many as keep the partial sums of hot latents, for which there is room
    in any case, within `MOST_PARTIALS`."""
    runs, first, n_entries = [], 0, 0
    for s, count in enumerate(count_S):
        if s > first and (n_entries + count) // ITEM * n_out * 4 > MOST_PARTIALS:
            runs.append(slice(first, s))
            first, n_entries = s, 0
        n_entries += count
    return [*runs, slice(first, len(count_S))]


def grouped_backward(
    entries: Entries, count_S: list[int], dy_BO: Tensor, W_S: list[Tensor], first_S: list[int], want_W: bool
) -> tuple[Tensor, Tensor]:
    """A row of W and the rows of dy that it needs are read once for both."""
    groups = groups_of(count_S, W_S, first_S)
    flat, _, dvalue_N = reduce_by_latent(entries, dy_BO, W_S[0], want_out=want_W, groups=groups)
    return dvalue_N, flat
