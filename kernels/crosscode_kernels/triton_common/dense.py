"""JumpReLU and the penalties on dense latents: one streaming kernel each way, parts switched on at compile time.

Axes: B tokens · L latents · S splits of the tokens · T tiles of latents.

A program owns a tile of latents, so that theta, n, lambda and the column sums stay in registers, and streams the rows
of its split of the tokens through it. Partial sums of splits and tiles are added by the caller in fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from crosscode_kernels.triton_common.heuristics import dense_config
from crosscode_kernels.triton_common.launch import launch
from crosscode_kernels.triton_common.primitives import relu_nan, tanh, tanh_slope


@triton.jit
def _dense_fwd_kernel(
    h_ptr, t_ptr, n_ptr, lambda_ptr, lambda_pre_ptr, a_ptr, partial_ptr, pre_ptr, slope_ptr, deficit_ptr, fired_ptr, B, L,
    rows_per_split, c, JUMP: tl.constexpr, L1: tl.constexpr, TANH: tl.constexpr, PRE: tl.constexpr,
    SLOPE: tl.constexpr, SUMS: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """SLOPE: of each latent the sum of `d penalty / d n`. SUMS: that of `relu(theta - h)`, and how often it is active."""
    pid_l = tl.program_id(0)
    pid_s = tl.program_id(1)
    offs_l = pid_l * BLOCK_L + tl.arange(0, BLOCK_L)
    mask_l = offs_l < L
    if JUMP or PRE:
        theta = tl.exp(tl.load(t_ptr + offs_l, mask=mask_l, other=0.0).to(tl.float32))
    if L1 or TANH or PRE:
        n = tl.load(n_ptr + offs_l, mask=mask_l, other=0.0).to(tl.float32)
    penalty = tl.zeros([BLOCK_L], dtype=tl.float32)
    pre = tl.zeros([BLOCK_L], dtype=tl.float32)
    slope = tl.zeros([BLOCK_L], dtype=tl.float32)
    fired = tl.zeros([BLOCK_L], dtype=tl.int32)
    first_b = pid_s.to(tl.int64) * rows_per_split
    for step in range(0, tl.minimum(rows_per_split, B - first_b)):
        offs = (first_b + step) * L + offs_l
        h = tl.load(h_ptr + offs, mask=mask_l, other=0.0).to(tl.float32)  # [BLOCK_L]
        a = h
        if JUMP:
            a = tl.where(h <= theta, 0.0, h)
            tl.store(a_ptr + offs, a, mask=mask_l)
        if L1:
            penalty += a * n
        if TANH:
            penalty += tanh(c * a * n)
        if L1 and SLOPE:
            slope += a
        if TANH and SLOPE:
            slope += c * a * tanh_slope(c * a * n)
        if PRE:
            pre += relu_nan(theta - h) * n
        if SUMS:
            pre += relu_nan(theta - h)
            fired += tl.where(a > 0.0, 1, 0)
    out = pid_s * tl.num_programs(0) + pid_l
    out_l = pid_s.to(tl.int64) * L + offs_l
    if SLOPE:
        tl.store(slope_ptr + out_l, slope, mask=mask_l)
    if SUMS:
        tl.store(deficit_ptr + out_l, pre, mask=mask_l)
        tl.store(fired_ptr + out_l, fired, mask=mask_l)
    if L1 or TANH:
        coefficient = tl.load(lambda_ptr + offs_l, mask=mask_l, other=0.0).to(tl.float32)
        tl.store(partial_ptr + out, tl.sum(tl.where(mask_l, penalty * coefficient, 0.0), 0))
    if PRE:
        coefficient_pre = tl.load(lambda_pre_ptr + offs_l, mask=mask_l, other=0.0).to(tl.float32)
        tl.store(pre_ptr + out, tl.sum(tl.where(mask_l, pre * coefficient_pre, 0.0), 0))


@triton.jit
def _dense_bwd_kernel(
    da_ptr, g_ptr, g_pre_ptr, h_ptr, t_ptr, n_ptr, lambda_ptr, lambda_pre_ptr, d_deficit_ptr, dh_ptr, dt_ptr, dn_ptr,
    db_ptr, B, L, rows_per_split, c, eps, JUMP: tl.constexpr, GDM: tl.constexpr, L1: tl.constexpr, TANH: tl.constexpr,
    PRE: tl.constexpr, DEFICIT: tl.constexpr, SUM: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """DEFICIT: a gradient of each latent's sum of `relu(theta - h)` comes in. SUM: that of the rows goes out, the bias's."""
    pid_s = tl.program_id(1)
    offs_l = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    mask_l = offs_l < L
    if JUMP or PRE:
        theta = tl.exp(tl.load(t_ptr + offs_l, mask=mask_l, other=0.0).to(tl.float32))
    if L1 or TANH or PRE:
        n = tl.load(n_ptr + offs_l, mask=mask_l, other=0.0).to(tl.float32)
    if L1 or TANH:
        weight = tl.load(lambda_ptr + offs_l, mask=mask_l, other=0.0).to(tl.float32) * tl.load(g_ptr) / B
    if PRE:
        weight_pre = tl.load(lambda_pre_ptr + offs_l, mask=mask_l, other=0.0).to(tl.float32) * tl.load(g_pre_ptr) / B
        silent = weight_pre * n
    if DEFICIT:
        silent = tl.load(d_deficit_ptr + offs_l, mask=mask_l, other=0.0).to(tl.float32)
    dt = tl.zeros([BLOCK_L], dtype=tl.float32)
    dt_pre = tl.zeros([BLOCK_L], dtype=tl.float32)
    dn_pre = tl.zeros([BLOCK_L], dtype=tl.float32)
    db = tl.zeros([BLOCK_L], dtype=tl.float32)
    first_b = pid_s.to(tl.int64) * rows_per_split
    for step in range(0, tl.minimum(rows_per_split, B - first_b)):
        offs = (first_b + step) * L + offs_l
        h = tl.load(h_ptr + offs, mask=mask_l, other=0.0).to(tl.float32)  # [BLOCK_L]
        a = h
        dh = tl.zeros([BLOCK_L], dtype=tl.float32)
        if JUMP:
            a = tl.where(h <= theta, 0.0, h)
            dh = tl.load(da_ptr + offs, mask=mask_l, other=0.0).to(tl.float32)
        if L1:
            dh += weight * n
        if TANH:
            dh += weight * c * n * tanh_slope(c * a * n)
        if JUMP:
            inside = tl.abs(h - theta) < eps / 2
            dt -= tl.where(inside, dh, 0.0)
            dh = tl.where(h <= theta, 0.0, dh)
        if PRE or DEFICIT:
            deficit = theta - h
            below = tl.where(deficit <= 0.0, 0.0, 1.0)
            dh -= silent * below
            dt_pre += below
        if PRE:
            dn_pre += relu_nan(deficit)
        if SUM:
            db += dh
        tl.store(dh_ptr + offs, dh, mask=mask_l)
    out = pid_s.to(tl.int64) * L + offs_l
    if JUMP:
        dt *= theta / eps
        if GDM:
            dt *= theta
    if PRE or DEFICIT:
        dt += silent * theta * dt_pre
    if SUM:
        tl.store(db_ptr + out, db, mask=mask_l)
    if JUMP or PRE:
        tl.store(dt_ptr + out, dt, mask=mask_l)
    if PRE:
        tl.store(dn_ptr + out, weight_pre * dn_pre, mask=mask_l)


class DenseSums(NamedTuple):
    """`a_BL` after JumpReLU (None where that is off), the two penalty sums, mean over tokens, fp32 scalars; and for each latent
    what was asked for (else garbage): `lambda / B` times the penalty's slope in n, the deficits, how often it is active."""

    a_BL: Tensor | None
    penalty: Tensor
    pre: Tensor
    slope_L: Tensor
    deficit_L: Tensor
    fired_L: Tensor


def dense_forward(
    h_BL: Tensor, t_L: Tensor | None = None, n_L: Tensor | None = None, lambda_L: Tensor | None = None,
    lambda_pre_L: Tensor | None = None, *, jump: bool = False, l1: bool = False, tanh: bool = False, pre: bool = False,
    slope: bool = False, sums: bool = False, c: float = 1.0,
) -> DenseSums:  # fmt: skip
    """One pass over `h_BL`: the parts switched on, others untouched. Unused vectors may be None."""
    n_tokens, n_latents = h_BL.shape
    config = dense_config(n_tokens, n_latents, h_BL.element_size())
    grid = (triton.cdiv(n_latents, config.BLOCK_L), triton.cdiv(n_tokens, config.rows_per_split))
    a_BL = torch.empty_like(h_BL) if jump else None
    partial_ST, pre_ST = (h_BL.new_empty(grid[1], grid[0], dtype=torch.float32) for _ in range(2))
    slope_SL = h_BL.new_empty(grid[1] if slope else 0, n_latents, dtype=torch.float32)
    deficit_SL = h_BL.new_empty(grid[1] if sums else 0, n_latents, dtype=torch.float32)
    fired_SL = h_BL.new_empty(deficit_SL.shape, dtype=torch.int32)
    launch(
        _dense_fwd_kernel, grid, h_BL, _or(t_L, h_BL), _or(n_L, h_BL), _or(lambda_L, h_BL), _or(lambda_pre_L, h_BL),
        _or(a_BL, h_BL), partial_ST, pre_ST, slope_SL, deficit_SL, fired_SL, n_tokens, n_latents,
        config.rows_per_split, c, JUMP=jump, L1=l1, TANH=tanh, PRE=pre, SLOPE=slope, SUMS=sums, BLOCK_L=config.BLOCK_L,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    slope_L = slope_SL.sum(0) * (_or(lambda_L, slope_SL).float() / n_tokens) if slope else slope_SL
    return DenseSums(
        a_BL, partial_ST.sum() / n_tokens, pre_ST.sum() / n_tokens, slope_L, deficit_SL.sum(0), fired_SL.sum(0)
    )


class DenseGrads(NamedTuple):
    """Vectors in the dtypes of t, n and h (garbage of the right shape where unused)."""

    dh_BL: Tensor
    dt_L: Tensor
    dn_L: Tensor
    db_L: Tensor


def dense_backward(
    h_BL: Tensor, da_BL: Tensor | None = None, g: Tensor | None = None, g_pre: Tensor | None = None,
    t_L: Tensor | None = None, n_L: Tensor | None = None, lambda_L: Tensor | None = None,
    lambda_pre_L: Tensor | None = None, d_deficit_L: Tensor | None = None, *, jump: bool = False, gdm: bool = False,
    l1: bool = False, tanh: bool = False, pre: bool = False, want_sum: bool = False, c: float = 1.0, eps: float = 1.0,
) -> DenseGrads:  # fmt: skip
    """One pass over `h_BL` and, with `jump`, `da_BL`: the gradients of the parts switched on."""
    n_tokens, n_latents = h_BL.shape
    config = dense_config(n_tokens, n_latents, h_BL.element_size())
    n_splits = triton.cdiv(n_tokens, config.rows_per_split)
    dh_BL = torch.empty_like(h_BL)
    dt_SL, dn_SL = (h_BL.new_empty(n_splits, n_latents, dtype=torch.float32) for _ in range(2))
    db_SL = h_BL.new_empty(n_splits if want_sum else 0, n_latents, dtype=torch.float32)
    launch(
        _dense_bwd_kernel, (triton.cdiv(n_latents, config.BLOCK_L), n_splits), _or(da_BL, h_BL), _or(g, h_BL),
        _or(g_pre, h_BL), h_BL, _or(t_L, h_BL), _or(n_L, h_BL), _or(lambda_L, h_BL), _or(lambda_pre_L, h_BL),
        _or(d_deficit_L, h_BL), dh_BL, dt_SL, dn_SL, db_SL, n_tokens, n_latents, config.rows_per_split, c, eps,
        JUMP=jump, GDM=gdm, L1=l1, TANH=tanh, PRE=pre, DEFICIT=d_deficit_L is not None, SUM=want_sum,
        BLOCK_L=config.BLOCK_L, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    dt_L, dn_L = dt_SL.sum(0).to(_or(t_L, dt_SL).dtype), dn_SL.sum(0).to(_or(n_L, dn_SL).dtype)
    return DenseGrads(dh_BL, dt_L, dn_L, db_SL.sum(0).to(h_BL.dtype))


def _or(tensor: Tensor | None, placeholder: Tensor) -> Tensor:
    return placeholder if tensor is None else tensor
