"""Decode and reconstruction loss: the epilogue of the decode subtracts the target.

Axes: B tokens · O width of a decoder row · L latents · X crosscoding positions · T tiles of a position.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from crosscode_kernels.recon_loss.triton_impl import per_position
from crosscode_kernels.sparse import Entries
from crosscode_kernels.sparse_decode.triton_impl import gather_sum
from crosscode_kernels.triton_common.heuristics import decode_config
from crosscode_kernels.triton_common.launch import launch, runs_of_equal_width


@triton.jit
def _decode_recon_kernel(
    row_ptr, idx_ptr, value_ptr, W_ptr, b_ptr, target_ptr, residual_ptr, partial_ptr, n_out, first_o, width, first_tile,
    tiles_per_x, n_tiles, HAS_BIAS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Tiles of crosscoding positions of one width: stores `y - target` and each tile's squared sum, never y."""
    pid_b = tl.program_id(0).to(tl.int64)
    pid_t = tl.program_id(1)
    offs_d = (pid_t % tiles_per_x) * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_o = first_o + (pid_t // tiles_per_x) * width + offs_d
    mask_o = offs_d < width
    y = gather_sum(row_ptr, idx_ptr, value_ptr, W_ptr, pid_b, offs_o, mask_o, n_out, BLOCK_K, BLOCK_O)  # [BLOCK_O]
    if HAS_BIAS:
        y += tl.load(b_ptr + offs_o, mask=mask_o, other=0.0).to(tl.float32)
    residual = y - tl.load(target_ptr + pid_b * n_out + offs_o, mask=mask_o, other=0.0).to(tl.float32)
    tl.store(residual_ptr + pid_b * n_out + offs_o, residual, mask=mask_o)
    tl.store(partial_ptr + pid_b * n_tiles + first_tile + pid_t, tl.sum(tl.where(mask_o, residual * residual, 0.0), 0))


def decode_recon(
    entries: Entries, W_LO: Tensor, b_O: Tensor | None, target_BO: Tensor, segments: list[int]
) -> tuple[Tensor, Tensor]:
    """The output itself is never written."""
    (n_tokens, width), n_latents = target_BO.shape, W_LO.shape[0]
    config = decode_config(n_latents, width, W_LO.element_size())
    tiles_X = [triton.cdiv(segment, config.BLOCK_O) for segment in segments]
    residual_BO = torch.empty_like(target_BO)
    partial_BT = target_BO.new_empty(n_tokens, sum(tiles_X), dtype=torch.float32)
    for run in runs_of_equal_width(segments):
        tiles = tiles_X[run.first_x]
        launch(
            _decode_recon_kernel, (n_tokens, run.n_x * tiles), *entries[:3], W_LO,
            W_LO if b_O is None else b_O, target_BO, residual_BO, partial_BT, width, run.first_o, run.width,
            sum(tiles_X[: run.first_x]), tiles, sum(tiles_X), HAS_BIAS=b_O is not None, BLOCK_K=config.BLOCK_K,
            BLOCK_O=config.BLOCK_O, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return per_position(partial_BT, tiles_X), residual_BO
