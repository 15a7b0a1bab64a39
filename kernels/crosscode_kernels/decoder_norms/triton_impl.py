"""Decoder norms: rows of the decoder are read once, several to a program; the gradient is one more pass.

Axes: L latents · O flattened output dims · X crosscoding positions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from crosscode_kernels.triton_common.heuristics import norms_config
from crosscode_kernels.triton_common.launch import launch, runs_of_equal_width


@triton.jit
def _decoder_norms_fwd_kernel(
    W_ptr, norms_ptr, L, n_out, first_o, width, first_x, X, BLOCK_L: tl.constexpr, BLOCK_O: tl.constexpr
):
    pid_x = tl.program_id(1)
    offs_l = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    mask_l = offs_l < L
    acc = tl.zeros([BLOCK_L, BLOCK_O], dtype=tl.float32)
    for first_d in range(0, width, BLOCK_O):
        offs_d = first_d + tl.arange(0, BLOCK_O)
        offs_o = first_o + pid_x * width + offs_d
        w = tl.load(
            W_ptr + offs_l[:, None] * n_out + offs_o[None, :],
            mask=mask_l[:, None] & (offs_d < width)[None, :],
            other=0.0,
        ).to(tl.float32)  # [BLOCK_L, BLOCK_O]
        acc += w * w
    tl.store(norms_ptr + offs_l * X + first_x + pid_x, tl.sqrt(tl.sum(acc, 1)), mask=mask_l)


@triton.jit
def _over(gradient, norm):
    """`gradient / norm`, and 0 at norm 0."""
    return tl.where(norm == 0.0, 0.0, gradient / tl.where(norm == 0.0, 1.0, norm))


@triton.jit
def _decoder_norms_bwd_kernel(
    d_norms_ptr, d_n_ptr, W_ptr, norms_ptr, n_ptr, dW_ptr, L, n_out, first_o, width, first_x, X, tiles_per_x,
    JOINT: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    pid_x = tl.program_id(1) // tiles_per_x
    offs_l = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    mask_l = offs_l < L
    offs_d = (tl.program_id(1) % tiles_per_x) * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_o = first_o + pid_x * width + offs_d
    mask = mask_l[:, None] & (offs_d < width)[None, :]
    norm = tl.load(norms_ptr + offs_l * X + first_x + pid_x, mask=mask_l, other=0.0)  # [BLOCK_L]
    d_norm = tl.load(d_norms_ptr + offs_l * X + first_x + pid_x, mask=mask_l, other=0.0)
    d_n = tl.load(d_n_ptr + offs_l, mask=mask_l, other=0.0)
    if JOINT:
        n = tl.load(n_ptr + offs_l, mask=mask_l, other=0.0)
        scale = _over(d_norm, norm) + _over(d_n, n)
    else:
        scale = _over(d_norm + d_n, norm)
    offs = offs_l[:, None] * n_out + offs_o[None, :]
    w = tl.load(W_ptr + offs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_L, BLOCK_O]
    tl.store(dW_ptr + offs, scale[:, None] * w, mask=mask)


def decoder_norms(W_dec_LO: Tensor, segments: list[int], joint: bool) -> tuple[Tensor, Tensor]:
    n_latents, width = W_dec_LO.shape
    config = norms_config(max(segments))
    norms_LX = W_dec_LO.new_empty(n_latents, len(segments), dtype=torch.float32)
    for run in runs_of_equal_width(segments):
        launch(
            _decoder_norms_fwd_kernel, (triton.cdiv(n_latents, config.BLOCK_L), run.n_x), W_dec_LO, norms_LX,
            n_latents, width, run.first_o, run.width, run.first_x, len(segments), BLOCK_L=config.BLOCK_L,
            BLOCK_O=config.BLOCK_O, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return norms_LX, torch.linalg.vector_norm(norms_LX, dim=1) if joint else norms_LX.sum(1)


def decoder_norms_backward(
    d_norms_LX: Tensor, d_n_L: Tensor, W_dec_LO: Tensor, norms_LX: Tensor, n_L: Tensor, segments: list[int], joint: bool
) -> Tensor:
    n_latents, width = W_dec_LO.shape
    config = norms_config(max(segments))
    dW_LO = torch.empty_like(W_dec_LO)
    for run in runs_of_equal_width(segments):
        tiles = triton.cdiv(run.width, config.BLOCK_O)
        launch(
            _decoder_norms_bwd_kernel, (triton.cdiv(n_latents, config.BLOCK_L), run.n_x * tiles), d_norms_LX, d_n_L,
            W_dec_LO, norms_LX, n_L, dW_LO, n_latents, width, run.first_o, run.width, run.first_x, len(segments),
            tiles, JOINT=joint, BLOCK_L=config.BLOCK_L, BLOCK_O=config.BLOCK_O, num_warps=config.num_warps,
        )  # fmt: skip
    return dW_LO
