"""One pass over a weight: a program sums its row's entries in registers, tile by tile, and moves it by Adam's rule.

Axes: L latents (rows) · F width of a row · S slices of the width · N entries · B tokens.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from crosscode_kernels.segments.deferred import SegmentGrad
from crosscode_kernels.segments.triton_impl import RowSums, row_sum
from crosscode_kernels.triton_common.heuristics import ITEM, segment_config
from crosscode_kernels.triton_common.launch import INTERPRETED, launch


@triton.jit
def _grad_tile(
    order_a, token_a, latent_a, extra_a, weight_a, rows_a, partial_a, order_b, token_b, latent_b, extra_b, weight_b,
    rows_b, partial_b, dense_ptr, latent, offs_f, mask_f, width, N_SUMS: tl.constexpr, HAS_DENSE: tl.constexpr,
    OVERFLOW_A: tl.constexpr, OVERFLOW_B: tl.constexpr, ITEM: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    """A tile of the gradient: up to two sums, and what is there already."""
    grad = tl.zeros([BLOCK_F], dtype=tl.float32)
    if N_SUMS > 0:
        grad += row_sum(
            order_a, token_a, latent_a, extra_a, weight_a, rows_a, partial_a, latent, offs_f, mask_f, width, OVERFLOW_A,
            ITEM, BLOCK_E, BLOCK_F,
        )  # fmt: skip
    if N_SUMS > 1:
        grad += row_sum(
            order_b, token_b, latent_b, extra_b, weight_b, rows_b, partial_b, latent, offs_f, mask_f, width, OVERFLOW_B,
            ITEM, BLOCK_E, BLOCK_F,
        )  # fmt: skip
    if HAS_DENSE:
        grad += tl.load(dense_ptr + latent * width + offs_f, mask=mask_f, other=0.0).to(tl.float32)
    return grad


@triton.jit
def _n_entries(latent_a, latent_b, latent, N_SUMS: tl.constexpr, HAS_DENSE: tl.constexpr):
    """How many entries a row sums; 1 where there is more than sums."""
    n = 1
    if not HAS_DENSE:
        n = tl.load(latent_a + latent + 1) - tl.load(latent_a + latent)
        if N_SUMS > 1:
            n += tl.load(latent_b + latent + 1) - tl.load(latent_b + latent)
    return n


@triton.jit
def _row_norms_kernel(
    order_a, token_a, latent_a, extra_a, weight_a, rows_a, partial_a, order_b, token_b, latent_b, extra_b, weight_b,
    rows_b, partial_b, dense_ptr, square_ptr, L, width, slice_width, N_SUMS: tl.constexpr, HAS_DENSE: tl.constexpr,
    OVERFLOW_A: tl.constexpr, OVERFLOW_B: tl.constexpr, ITEM: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    """`square[s, l]`: the squared norm of a slice of row l of the gradient."""
    latent = tl.program_id(0).to(tl.int64)
    here = square_ptr + tl.program_id(1).to(tl.int64) * L + latent
    if _n_entries(latent_a, latent_b, latent, N_SUMS, HAS_DENSE) == 0:
        tl.store(here, 0.0)
        return
    first_s = tl.program_id(1) * slice_width
    square = tl.zeros([BLOCK_F], dtype=tl.float32)
    for first_f in range(first_s, tl.minimum(first_s + slice_width, width), BLOCK_F):
        offs_f = first_f + tl.arange(0, BLOCK_F)
        mask_f = offs_f < width
        grad = _grad_tile(
            order_a, token_a, latent_a, extra_a, weight_a, rows_a, partial_a, order_b, token_b, latent_b, extra_b,
            weight_b, rows_b, partial_b, dense_ptr, latent, offs_f, mask_f, width, N_SUMS, HAS_DENSE, OVERFLOW_A,
            OVERFLOW_B, ITEM, BLOCK_E, BLOCK_F,
        )  # [BLOCK_F]  # fmt: skip
        square += tl.where(mask_f, grad * grad, 0.0)
    tl.store(here, tl.sum(square, 0))


@triton.jit
def _noise(here, step):
    """32 bits that depend on a number's place and the step alone: a run that goes on draws what it would have drawn."""
    bits = here.to(tl.uint32) * 0x9E3779B1 + step.to(tl.uint32) * 0x85EBCA77
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return bits ^ (bits >> 16)


@triton.jit
def _to_16_bits(value, added):
    """float32 of which 16 bits are left, after `added` (0 to 0xFFFF) to those that go. NaN stays."""
    bits = (value.to(tl.int32, bitcast=True) + added.to(tl.int32)) & -65536
    return tl.where(value == value, bits.to(tl.float32, bitcast=True), value)


@triton.jit
def _adam_rows_kernel(
    order_a, token_a, latent_a, extra_a, weight_a, rows_a, partial_a, order_b, token_b, latent_b, extra_b, weight_b,
    rows_b, partial_b, dense_ptr, param_ptr, mean_ptr, square_ptr, last_ptr, copy_ptr, number_ptr, width, slice_width,
    new_1, old_2, new_2, log2_old_2, eps, HAS_COPY: tl.constexpr, ROUND: tl.constexpr, IN_16_BITS: tl.constexpr,
    ROW_SPARSE: tl.constexpr, N_SUMS: tl.constexpr, HAS_DENSE: tl.constexpr, OVERFLOW_A: tl.constexpr,
    OVERFLOW_B: tl.constexpr, ITEM: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """`new_1 = 1 - beta1`, `old_2 = beta2`, `new_2 = 1 - beta2`; `number`: see `_numbers`. With ROW_SPARSE beta1 is 0: there is
    no first moment, rows without entries are left alone, and others first decay as often as they were (`last`: the step
    up to which they have)."""
    if tl.load(number_ptr + 3) == 0.0:
        return
    latent = tl.program_id(0).to(tl.int64)
    decay = 1.0
    if ROW_SPARSE:
        if _n_entries(latent_a, latent_b, latent, N_SUMS, HAS_DENSE) == 0:
            return
        missed = tl.load(number_ptr + 4) - 1.0 - tl.load(last_ptr + latent).to(tl.float32)
        decay = tl.where(missed > 0.0, tl.exp2(missed * log2_old_2), 1.0)
    step_size = tl.load(number_ptr)
    root_correction = tl.load(number_ptr + 1)
    factor = tl.load(number_ptr + 2)
    first_s = tl.program_id(1) * slice_width
    for first_f in range(first_s, tl.minimum(first_s + slice_width, width), BLOCK_F):
        offs_f = first_f + tl.arange(0, BLOCK_F)
        mask_f = offs_f < width
        here = latent * width + offs_f
        # On their way while the entries are summed.
        param = tl.load(param_ptr + here, mask=mask_f, other=0.0)  # [BLOCK_F]
        square = tl.load(square_ptr + here, mask=mask_f, other=0.0).to(tl.float32)
        if not ROW_SPARSE:
            mean = tl.load(mean_ptr + here, mask=mask_f, other=0.0).to(tl.float32)
        grad = factor * _grad_tile(
            order_a, token_a, latent_a, extra_a, weight_a, rows_a, partial_a, order_b, token_b, latent_b, extra_b,
            weight_b, rows_b, partial_b, dense_ptr, latent, offs_f, mask_f, width, N_SUMS, HAS_DENSE, OVERFLOW_A,
            OVERFLOW_B, ITEM, BLOCK_E, BLOCK_F,
        )  # fmt: skip
        square = old_2 * (decay * square) + new_2 * grad * grad
        if ROW_SPARSE:
            mean = grad
        else:
            mean += new_1 * (grad - mean)
        param -= step_size * mean / (tl.sqrt_rn(square) / root_correction + eps)
        if IN_16_BITS:
            noise = _noise(here, tl.load(number_ptr + 4).to(tl.int32))
            square = _to_16_bits(square, noise >> 16)
            if not ROW_SPARSE:
                mean = _to_16_bits(mean, noise & 0xFFFF)
        tl.store(param_ptr + here, param, mask=mask_f)
        tl.store(square_ptr + here, square, mask=mask_f)
        if not ROW_SPARSE:
            tl.store(mean_ptr + here, mean, mask=mask_f)
        if HAS_COPY:
            if ROUND:  # to nearest, ties to even, as GPUs do and the interpreter does not
                param = _to_16_bits(param, 0x7FFF + ((param.to(tl.int32, bitcast=True) >> 16) & 1))
            tl.store(copy_ptr + here, param, mask=mask_f)


class _Gradient:
    """What kernels take of a gradient `(L, ...)`: pointers, and constants."""

    def __init__(self, grad: Tensor) -> None:
        pending = grad.pending if isinstance(grad, SegmentGrad) else None
        sums: list[RowSums] = [] if pending is None else pending.sums
        dense = grad if pending is None else pending.dense_LF
        self.n_rows, self.width = grad.shape[0], grad[0].numel() if pending is None else grad.shape[1:].numel()
        if dense is not None:
            dense = dense.contiguous()
        rows = [one.rows_BI for one in sums]
        some = dense if dense is not None else rows[0]
        none = (some,) * 7
        arguments = [one.arguments() for one in sums] + [none] * (2 - len(sums))
        self.pointers = (*arguments[0], *arguments[1], some)
        n_tokens, size = max([row.shape[0] for row in rows] or [1]), max(one.element_size() for one in (*rows, some))
        config = segment_config(n_tokens, self.width, size)
        self.slice_width = config.slice_width
        self.grid = (self.n_rows, triton.cdiv(self.width, config.slice_width))
        overflow = [len(sums) > i and sums[i].entries.order_N.shape[0] >= ITEM for i in range(2)]
        self.meta: dict[str, Any] = {
            "N_SUMS": len(sums), "HAS_DENSE": dense is not None, "OVERFLOW_A": overflow[0], "OVERFLOW_B": overflow[1],
            "ITEM": ITEM, "BLOCK_E": config.BLOCK_E, "BLOCK_F": config.BLOCK_O, "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        }  # fmt: skip
        self._bounds = [] if dense is not None else [one.entries.latent_ptr_L1 for one in sums]

    def touched_rows(self) -> Tensor | None:
        """Which rows have entries; None: all may have a gradient."""
        counts = [bound_L1.diff() for bound_L1 in self._bounds]
        return sum(counts[1:], counts[0]) > 0 if counts else None


def norm_of_rows(grad: Tensor) -> Tensor:
    """The 2-norm of a gradient, a scalar; rows are summed, and none is written."""
    gradient = _Gradient(grad)
    square_SL = torch.empty(gradient.grid[1], gradient.n_rows, device=grad.device)
    launch(
        _row_norms_kernel, gradient.grid, *gradient.pointers, square_SL, gradient.n_rows, gradient.width,
        gradient.slice_width, **gradient.meta,
    )  # fmt: skip
    return square_SL.sum().sqrt()


def update_rows(
    param: Tensor, grad: Tensor, mean: Tensor | None, square: Tensor, last_step_R: Tensor | None, copy: Tensor | None,
    number_5: Tensor, betas: tuple[float, float], eps: float,
) -> None:  # fmt: skip
    """Adam in place: parameter, both moments, and the copy; with `last_step_R` in place of `mean` row-sparse."""
    gradient, none = _Gradient(grad), param
    row_sparse = last_step_R is not None
    launch(
        _adam_rows_kernel, gradient.grid, *gradient.pointers, param, none if mean is None else mean, square,
        last_step_R if row_sparse else none, none if copy is None else copy, number_5, gradient.width,
        gradient.slice_width, 1 - betas[0], betas[1], 1 - betas[1], math.log2(betas[1]) if betas[1] else -math.inf, eps,
        HAS_COPY=copy is not None, ROUND=INTERPRETED and copy is not None and copy.dtype == torch.bfloat16,
        IN_16_BITS=square.dtype == torch.bfloat16, ROW_SPARSE=row_sparse, **gradient.meta,
    )  # fmt: skip
    if row_sparse:
        touched_R = gradient.touched_rows()
        is_new_R = (number_5[3] != 0) if touched_R is None else touched_R & (number_5[3] != 0)
        last_step_R.copy_(torch.where(is_new_R, number_5[4].int(), last_step_R))
