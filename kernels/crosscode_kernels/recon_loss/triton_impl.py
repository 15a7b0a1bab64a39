"""Reconstruction loss: one pass over output and target leaves the residual and the squared sums by position.

Axes: B tokens · O output width · X crosscoding positions · T tiles of a position.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from crosscode_kernels.triton_common.heuristics import elementwise_config
from crosscode_kernels.triton_common.launch import launch, runs_of_equal_width


@triton.jit
def _recon_loss_fwd_kernel(
    y_ptr, target_ptr, residual_ptr, partial_ptr, n_out, first_o, width, first_tile, tiles_per_x, n_tiles,
    BLOCK: tl.constexpr,
):  # fmt: skip
    pid_b = tl.program_id(0).to(tl.int64)
    pid_t = tl.program_id(1)
    offs_d = (pid_t % tiles_per_x) * BLOCK + tl.arange(0, BLOCK)
    offs_o = pid_b * n_out + first_o + (pid_t // tiles_per_x) * width + offs_d
    mask = offs_d < width
    y = tl.load(y_ptr + offs_o, mask=mask, other=0.0).to(tl.float32)
    residual = y - tl.load(target_ptr + offs_o, mask=mask, other=0.0).to(tl.float32)
    tl.store(residual_ptr + offs_o, residual, mask=mask)
    tl.store(partial_ptr + pid_b * n_tiles + first_tile + pid_t, tl.sum(residual * residual, 0))


@triton.jit
def _recon_loss_bwd_kernel(
    g_ptr, residual_ptr, dy_ptr, n_out, first_o, width, first_x, tiles_per_x, two_over_B, BLOCK: tl.constexpr
):
    pid_b = tl.program_id(0).to(tl.int64)
    pid_x = tl.program_id(1) // tiles_per_x
    offs_d = (tl.program_id(1) % tiles_per_x) * BLOCK + tl.arange(0, BLOCK)
    offs_o = pid_b * n_out + first_o + pid_x * width + offs_d
    mask = offs_d < width
    residual = tl.load(residual_ptr + offs_o, mask=mask, other=0.0).to(tl.float32)
    tl.store(dy_ptr + offs_o, tl.load(g_ptr + first_x + pid_x) * two_over_B * residual, mask=mask)


def per_position(partial_BT: Tensor, tiles_X: list[int]) -> Tensor:
    """Mean over tokens of the squared sums, by position: partials of each position's tiles summed in fixed order."""
    return torch.stack([part_BT.sum() for part_BT in partial_BT.split(tiles_X, dim=1)]) / partial_BT.shape[0]


def recon_loss(y_BO: Tensor, target_BO: Tensor, segments: list[int]) -> tuple[Tensor, Tensor]:
    n_tokens, width = y_BO.shape
    config = elementwise_config(max(segments))
    tiles_X = [triton.cdiv(segment, config.BLOCK) for segment in segments]
    residual_BO = torch.empty_like(y_BO)
    partial_BT = y_BO.new_empty(n_tokens, sum(tiles_X), dtype=torch.float32)
    for run in runs_of_equal_width(segments):
        tiles = tiles_X[run.first_x]
        launch(
            _recon_loss_fwd_kernel, (n_tokens, run.n_x * tiles), y_BO, target_BO, residual_BO, partial_BT, width,
            run.first_o, run.width, sum(tiles_X[: run.first_x]), tiles, sum(tiles_X), BLOCK=config.BLOCK,
            num_warps=config.num_warps,
        )  # fmt: skip
    return per_position(partial_BT, tiles_X), residual_BO


def recon_loss_backward(g_X: Tensor, residual_BO: Tensor, segments: list[int]) -> Tensor:
    n_tokens, width = residual_BO.shape
    config = elementwise_config(max(segments))
    dy_BO = torch.empty_like(residual_BO)
    for run in runs_of_equal_width(segments):
        tiles = triton.cdiv(run.width, config.BLOCK)
        launch(
            _recon_loss_bwd_kernel, (n_tokens, run.n_x * tiles), g_X, residual_BO, dy_BO, width, run.first_o,
            run.width, run.first_x, tiles, 2.0 / n_tokens, BLOCK=config.BLOCK, num_warps=config.num_warps,
        )  # fmt: skip
    return dy_BO
