"""step_l0 of what `encode_jumprelu` has kept: dense pre-activations, in row blocks, or those of the stored entries.

Axes: B tokens · L latents · N stored entries.

An entry that is not stored lies below its threshold's window: it counts for nothing, in either direction.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from crosscode_kernels.blocks import row_blocks
from crosscode_kernels.jumprelu.torch_impl import threshold, window
from crosscode_kernels.sparse import SparseLatents


def dense_step(h_BL: Tensor, t_L: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`l0_B, firing_L` of dense pre-activations."""
    return _DenseStep.apply(h_BL, t_L, eps)


def sparse_step(latents: SparseLatents, t_L: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`l0_B, firing_L` of sparse latents."""
    h_N = latents.preacts
    assert h_N is not None
    return _SparseStep.apply(h_N, latents.token_idx_N(), latents.latent_idx_N, latents.batch_size, t_L, eps)


class _DenseStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        h_BL, t_L, ctx.eps = arguments
        ctx.save_for_backward(h_BL, t_L)
        ctx.set_materialize_grads(False)
        theta_L = threshold(t_L, h_BL.dtype)
        l0_B, firing_L = theta_L.new_empty(h_BL.shape[0]), torch.zeros_like(theta_L)
        for rows in row_blocks(h_BL):
            active_RL = (h_BL[rows] - theta_L).sign_().relu_()
            l0_B[rows] = active_RL.sum(1)
            firing_L += active_RL.sum(0)
        return l0_B, firing_L

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, Tensor | None, None]:
        (h_BL, t_L), (dl0_B, dfiring_L) = ctx.saved_tensors, grads
        theta_L = threshold(t_L, h_BL.dtype)
        into_window_L = torch.zeros_like(theta_L)
        for rows in row_blocks(h_BL):
            window_RL = window(h_BL[rows] - theta_L, ctx.eps)
            if dl0_B is not None:
                into_window_L += dl0_B[rows] @ window_RL
            if dfiring_L is not None:
                into_window_L += dfiring_L * window_RL.sum(0)
        return None, (into_window_L * (theta_L / -ctx.eps)).to(t_L.dtype), None


class _SparseStep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        h_N, token_N, latent_N, n_tokens, t_L, ctx.eps = arguments
        ctx.save_for_backward(h_N, token_N, latent_N, t_L)
        ctx.set_materialize_grads(False)
        theta_L = threshold(t_L, h_N.dtype)
        active_N = (h_N - theta_L[latent_N]).sign_().relu_()
        l0_B = theta_L.new_zeros(n_tokens).index_add_(0, token_N, active_N)
        return l0_B, torch.zeros_like(theta_L).index_add_(0, latent_N, active_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (h_N, token_N, latent_N, t_L), (dl0_B, dfiring_L) = ctx.saved_tensors, grads
        theta_L = threshold(t_L, h_N.dtype)
        grad_N = torch.zeros_like(h_N, dtype=theta_L.dtype)
        if dl0_B is not None:
            grad_N += dl0_B[token_N]
        if dfiring_L is not None:
            grad_N += dfiring_L[latent_N]
        inside_N = window(h_N - theta_L[latent_N], ctx.eps).mul_(grad_N)
        into_window_L = torch.zeros_like(theta_L).index_add_(0, latent_N, inside_N)
        return *(None,) * 4, (into_window_L * (theta_L / -ctx.eps)).to(t_L.dtype), None
