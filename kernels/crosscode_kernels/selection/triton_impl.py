"""Row top-k of pre-activations: chunk maxima bound the k-th value from below, a radix select finds it exactly.

Axes: B tokens · L columns of pre-activations · K kept per token · C chunks of a row.

A row is streamed once, leaving the maximum of each chunk. The k-th largest maximum bounds the k-th value from below, so
only chunks that reach it are read again: their ids are listed, then what reaches it in them. A radix select over the list
gives the k-th key; everything above it and the first ties by index are kept, ids ascending. A row with more candidates than
the list holds (ties, mostly) is selected from the row itself: nothing is ever capped.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from crosscode_kernels.encoder import Encoder
from crosscode_kernels.triton_common.heuristics import (
    KeyLayout,
    RowSelectConfig,
    key_layout,
    preacts_at_a_time,
    row_select_config,
)
from crosscode_kernels.triton_common.launch import launch
from crosscode_kernels.triton_common.primitives import count_digit, pick_digit, rank_keys, relu_nan


@triton.jit
def _kth_of_maxima(maxima_ptr, n_chunks, k, DIGIT_BITS: tl.constexpr, N_DIGITS: tl.constexpr, BLOCK: tl.constexpr):
    """The k-th largest of `n_chunks` keys (0 where there are fewer)."""
    BINS: tl.constexpr = 1 << DIGIT_BITS
    prefix = k * 0
    remaining = k
    for d in tl.static_range(N_DIGITS):
        hist = tl.zeros([BINS], dtype=tl.int32)
        for first in range(0, n_chunks, BLOCK):
            offs_c = first + tl.arange(0, BLOCK)
            key = tl.load(maxima_ptr + offs_c, mask=offs_c < n_chunks, other=0).to(tl.int32)
            hist = count_digit(hist, key, offs_c < n_chunks, prefix, d, DIGIT_BITS, N_DIGITS)
        prefix, remaining = pick_digit(hist, prefix, remaining, BINS)
    return prefix


@triton.jit
def _source_keys(h_row, list_ptr, n_listed, position, mask, n_columns, HAS_LIST: tl.constexpr, KEY_DTYPE: tl.constexpr):
    """Column, value and key at a position of the source: the candidate list, or (`n_listed` = 0) the row itself.

    A row is read up to its end even where fewer columns count: `n_columns` is aligned, so these loads stay wide.
    """
    column = position
    if HAS_LIST:
        listed = tl.load(list_ptr + position, mask=mask & (position < n_listed), other=0)
        column = tl.where(position < n_listed, listed, position)
    else:
        mask = position < n_columns
    value = relu_nan(tl.load(h_row + column, mask=mask, other=0.0).to(tl.float32))
    return column, value, rank_keys(value, KEY_DTYPE)


@triton.jit
def _row_select_kernel(
    h_ptr, limit_ptr, maxima_ptr, list_ptr, idx_ptr, value_ptr, n_columns, n_chunks, k, HAS_LIMIT: tl.constexpr,
    SCREEN: tl.constexpr, KEY_DTYPE: tl.constexpr, DIGIT_BITS: tl.constexpr, N_DIGITS: tl.constexpr,
    SCAN: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    pid_b = tl.program_id(0).to(tl.int64)
    h_row = h_ptr + pid_b * n_columns
    maxima_row = maxima_ptr + pid_b * n_chunks
    list_row = list_ptr + pid_b * (2 * CAPACITY)
    chunk_row = list_row + CAPACITY
    n_valid = n_columns
    if HAS_LIMIT:
        n_valid = tl.minimum(tl.load(limit_ptr + pid_b), n_columns)
    n_source = n_valid
    n_listed = n_columns * 0
    BINS: tl.constexpr = 1 << DIGIT_BITS
    CHUNKS: tl.constexpr = BLOCK // CHUNK
    offs = tl.arange(0, BLOCK)
    if SCREEN:
        offs_within = tl.arange(0, CHUNK)
        for first in range(0, n_valid, SCAN):
            offs_c = first // CHUNK + tl.arange(0, SCAN // CHUNK)
            offs_tile = offs_c[:, None] * CHUNK + offs_within[None, :]  # [SCAN // CHUNK, CHUNK]
            h = tl.load(h_row + offs_tile, mask=offs_tile < n_columns, other=0.0).to(tl.float32)
            key = tl.where(offs_tile < n_valid, rank_keys(relu_nan(h), KEY_DTYPE), 0)
            tl.store(maxima_row + offs_c, tl.max(key, 1), mask=offs_c < n_chunks)
        tl.debug_barrier()
        bound = _kth_of_maxima(maxima_row, tl.cdiv(n_valid, CHUNK), k, DIGIT_BITS, N_DIGITS, BLOCK)
        n_reaching = n_columns * 0
        for first in range(0, tl.cdiv(n_valid, CHUNK), BLOCK):
            reaches = tl.load(maxima_row + first + offs, mask=(first + offs) * CHUNK < n_valid, other=-1) >= bound
            position = n_reaching + tl.cumsum(reaches.to(tl.int32), 0) - reaches.to(tl.int32)
            tl.store(chunk_row + position, first + offs, mask=reaches & (position < CAPACITY))
            n_reaching += tl.sum(reaches.to(tl.int32), 0)
        tl.debug_barrier()
        # Each of these chunks holds a candidate: more of them than the list holds means more candidates, too.
        for first in range(0, tl.where(n_reaching <= CAPACITY, n_reaching, 0), CHUNKS):
            mask_c = first + tl.arange(0, CHUNKS) < n_reaching
            chunk = tl.load(chunk_row + first + tl.arange(0, CHUNKS), mask=mask_c, other=0)
            offs_tile = chunk[:, None] * CHUNK + offs_within[None, :]  # [CHUNKS, CHUNK]
            h = tl.load(h_row + offs_tile, mask=mask_c[:, None] & (offs_tile < n_columns), other=0.0).to(tl.float32)
            take = mask_c[:, None] & (offs_tile < n_valid) & (rank_keys(relu_nan(h), KEY_DTYPE) >= bound)
            take = tl.reshape(take.to(tl.int32), [BLOCK])
            position = n_listed + tl.cumsum(take, 0) - take
            tl.store(list_row + position, tl.reshape(offs_tile, [BLOCK]), mask=(take > 0) & (position < CAPACITY))
            n_listed += tl.sum(take, 0)
        tl.debug_barrier()
        n_listed = tl.where(n_listed <= CAPACITY, n_listed, 0)
        n_source = tl.where(n_listed > 0, n_listed, n_valid)
    threshold = k * 0
    ties = k
    for d in tl.static_range(N_DIGITS):
        hist = tl.zeros([BINS], dtype=tl.int32)
        for first in range(0, n_source, BLOCK):
            mask = first + offs < n_source
            _column, _value, key = _source_keys(
                h_row, list_row, n_listed, first + offs, mask, n_columns, SCREEN, KEY_DTYPE
            )
            hist = count_digit(hist, key, mask, threshold, d, DIGIT_BITS, N_DIGITS)
        threshold, ties = pick_digit(hist, threshold, ties, BINS)
    stored = k * 0
    ties_seen = k * 0
    for first in range(0, n_source, BLOCK):
        mask = first + offs < n_source
        column, value, key = _source_keys(h_row, list_row, n_listed, first + offs, mask, n_columns, SCREEN, KEY_DTYPE)
        tie = (mask & (key == threshold)).to(tl.int32)
        tie_rank = ties_seen + tl.cumsum(tie, 0) - tie
        take = ((mask & (key > threshold)) | ((tie > 0) & (tie_rank < ties))).to(tl.int32)
        position = stored + tl.cumsum(take, 0) - take
        tl.store(idx_ptr + pid_b * k + position, column, mask=take > 0)
        tl.store(value_ptr + pid_b * k + position, value, mask=take > 0)
        ties_seen += tl.sum(tie, 0)
        stored += tl.sum(take, 0)


def row_topk(h_BL: Tensor, k: int, limit: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`(column_BK int32, value_BK)`: the k largest of `relu(h)` of each row, columns ascending; of equals the first.

    With `limit` (int32, on the device, one number or one a row) only columns below it count; rows are padded with (0, 0) where
    it is below k.
    """
    n_rows, n_columns = h_BL.shape
    config, layout = row_select_config(n_columns, k, h_BL.element_size()), key_layout(h_BL.dtype)
    new = h_BL.new_empty if limit is None else h_BL.new_zeros
    idx_BK, value_BK = new(n_rows, k, dtype=torch.int32), new(n_rows, k)
    if k > 0:
        limit = None if limit is None else limit.expand(n_rows).contiguous()
        _launch_row_select(h_BL, k, limit, idx_BK, value_BK, config, layout)
    return idx_BK, value_BK


def _launch_row_select(
    h_BL: Tensor, k: int, limit: Tensor | None, idx_BK: Tensor, value_BK: Tensor, config: RowSelectConfig,
    layout: KeyLayout,
) -> None:  # fmt: skip
    n_rows, n_columns = h_BL.shape
    n_chunks = triton.cdiv(n_columns, config.CHUNK)
    screen = n_columns > config.CAPACITY and n_chunks > k
    scratch_rows = n_rows if screen else 1
    maxima_BC = h_BL.new_empty(scratch_rows, n_chunks, dtype=layout.torch_dtype)
    list_BC = h_BL.new_empty(scratch_rows, 2 * config.CAPACITY, dtype=torch.int32)
    launch(
        _row_select_kernel, (n_rows,), h_BL, h_BL if limit is None else limit, maxima_BC, list_BC, idx_BK, value_BK,
        n_columns, n_chunks, k, HAS_LIMIT=limit is not None, SCREEN=screen, KEY_DTYPE=layout.KEY_DTYPE,
        DIGIT_BITS=layout.DIGIT_BITS, N_DIGITS=layout.N_DIGITS, SCAN=config.SCAN, BLOCK=config.BLOCK,
        CHUNK=config.CHUNK, CAPACITY=config.CAPACITY, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def preacts(encoder: Encoder) -> Tensor:
    """`h_BL = x W_enc^T + b_enc`, the vendor's GEMM."""
    x_BI, W_enc_LI, b_enc_L = encoder
    return x_BI @ W_enc_LI.T if b_enc_L is None else torch.addmm(b_enc_L, x_BI, W_enc_LI.T)


def latent_chunks(n_tokens: int, n_latents: int, unit: int = 1) -> list[slice]:
    """Latents whose pre-activations are alive at a time, in whole units: W_enc is read once, x for each chunk."""
    step = preacts_at_a_time(n_tokens, n_latents, unit)
    return [slice(first, min(first + step, n_latents)) for first in range(0, n_latents, step)]


def token_chunks(n_tokens: int, n_latents: int) -> list[slice]:
    """The same by tokens, for what needs whole rows."""
    step = preacts_at_a_time(n_latents, n_tokens)
    return [slice(first, min(first + step, n_tokens)) for first in range(0, n_tokens, step)]
