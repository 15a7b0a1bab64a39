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
    h_ptr, t_ptr, n_ptr, lambda_ptr, lambda_pre_ptr, a_ptr, partial_ptr, pre_ptr, B, L, rows_per_split, c,
    JUMP: tl.constexpr, L1: tl.constexpr, TANH: tl.constexpr, PRE: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
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
        if PRE:
            pre += relu_nan(theta - h) * n
    out = pid_s * tl.num_programs(0) + pid_l
    if L1 or TANH:
        coefficient = tl.load(lambda_ptr + offs_l, mask=mask_l, other=0.0).to(tl.float32)
        tl.store(partial_ptr + out, tl.sum(tl.where(mask_l, penalty * coefficient, 0.0), 0))
    if PRE:
        coefficient_pre = tl.load(lambda_pre_ptr + offs_l, mask=mask_l, other=0.0).to(tl.float32)
        tl.store(pre_ptr + out, tl.sum(tl.where(mask_l, pre * coefficient_pre, 0.0), 0))


@triton.jit
def _dense_bwd_kernel(
    da_ptr, g_ptr, g_pre_ptr, h_ptr, t_ptr, n_ptr, lambda_ptr, lambda_pre_ptr, dh_ptr, dt_ptr, dn_ptr, B, L,
    rows_per_split, c, eps, JUMP: tl.constexpr, GDM: tl.constexpr, L1: tl.constexpr, TANH: tl.constexpr,
    PRE: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
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
    dt = tl.zeros([BLOCK_L], dtype=tl.float32)
    dt_pre = tl.zeros([BLOCK_L], dtype=tl.float32)
    dn = tl.zeros([BLOCK_L], dtype=tl.float32)
    dn_pre = tl.zeros([BLOCK_L], dtype=tl.float32)
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
            dn += a
        if TANH:
            slope = tanh_slope(c * a * n)
            dh += weight * c * n * slope
            dn += c * a * slope
        if JUMP:
            inside = tl.abs(h - theta) < eps / 2
            dt -= tl.where(inside, dh, 0.0)
            dh = tl.where(h <= theta, 0.0, dh)
        if PRE:
            deficit = theta - h
            below = tl.where(deficit <= 0.0, 0.0, 1.0)
            dh -= weight_pre * n * below
            dt_pre += below
            dn_pre += relu_nan(deficit)
        tl.store(dh_ptr + offs, dh, mask=mask_l)
    out = pid_s.to(tl.int64) * L + offs_l
    if JUMP:
        dt *= theta / eps
        if GDM:
            dt *= theta
    if PRE:
        dt += weight_pre * n * theta * dt_pre
    if JUMP or PRE:
        tl.store(dt_ptr + out, dt, mask=mask_l)
    if L1 or TANH:
        dn *= weight
    if PRE:
        dn += weight_pre * dn_pre
    if L1 or TANH or PRE:
        tl.store(dn_ptr + out, dn, mask=mask_l)


class DenseSums(NamedTuple):
    """`a_BL` after JumpReLU (None where that is off), and the two penalty sums, mean over tokens, fp32 scalars."""

    a_BL: Tensor | None
    penalty: Tensor
    pre: Tensor


def dense_forward(
    h_BL: Tensor, t_L: Tensor | None = None, n_L: Tensor | None = None, lambda_L: Tensor | None = None,
    lambda_pre_L: Tensor | None = None, *, jump: bool = False, l1: bool = False, tanh: bool = False, pre: bool = False,
    c: float = 1.0,
) -> DenseSums:  # fmt: skip
    """One pass over `h_BL`: the parts switched on, others untouched. Unused vectors may be None."""
    n_tokens, n_latents = h_BL.shape
    config = dense_config(n_tokens, n_latents)
    grid = (triton.cdiv(n_latents, config.BLOCK_L), triton.cdiv(n_tokens, config.rows_per_split))
    a_BL = torch.empty_like(h_BL) if jump else None
    partial_ST, pre_ST = (h_BL.new_empty(grid[1], grid[0], dtype=torch.float32) for _ in range(2))
    launch(
        _dense_fwd_kernel, grid, h_BL, _or(t_L, h_BL), _or(n_L, h_BL), _or(lambda_L, h_BL), _or(lambda_pre_L, h_BL),
        _or(a_BL, h_BL), partial_ST, pre_ST, n_tokens, n_latents, config.rows_per_split, c, JUMP=jump, L1=l1,
        TANH=tanh, PRE=pre, BLOCK_L=config.BLOCK_L, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return DenseSums(a_BL, partial_ST.sum() / n_tokens, pre_ST.sum() / n_tokens)


def dense_backward(
    h_BL: Tensor, da_BL: Tensor | None = None, g: Tensor | None = None, g_pre: Tensor | None = None,
    t_L: Tensor | None = None, n_L: Tensor | None = None, lambda_L: Tensor | None = None,
    lambda_pre_L: Tensor | None = None, *, jump: bool = False, gdm: bool = False, l1: bool = False, tanh: bool = False,
    pre: bool = False, c: float = 1.0, eps: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`(dh_BL, dt_L, dn_L)`, the vectors in the dtypes of t and n (fp32 garbage of the right shape where unused)."""
    n_tokens, n_latents = h_BL.shape
    config = dense_config(n_tokens, n_latents)
    n_splits = triton.cdiv(n_tokens, config.rows_per_split)
    dh_BL = torch.empty_like(h_BL)
    dt_SL, dn_SL = (h_BL.new_empty(n_splits, n_latents, dtype=torch.float32) for _ in range(2))
    launch(
        _dense_bwd_kernel, (triton.cdiv(n_latents, config.BLOCK_L), n_splits), _or(da_BL, h_BL), _or(g, h_BL),
        _or(g_pre, h_BL), h_BL, _or(t_L, h_BL), _or(n_L, h_BL), _or(lambda_L, h_BL), _or(lambda_pre_L, h_BL), dh_BL,
        dt_SL, dn_SL, n_tokens, n_latents, config.rows_per_split, c, eps, JUMP=jump, GDM=gdm, L1=l1, TANH=tanh,
        PRE=pre, BLOCK_L=config.BLOCK_L, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    dt_L = dt_SL.sum(0).to(_or(t_L, dt_SL).dtype)
    return dh_BL, dt_L, dn_SL.sum(0).to(_or(n_L, dn_SL).dtype)


def _or(tensor: Tensor | None, placeholder: Tensor) -> Tensor:
    return placeholder if tensor is None else tensor
