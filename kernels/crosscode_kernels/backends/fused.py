"""What the fast backends share: checks at the door, autocast, and the registered ops with the backend's kernels.

Axes: B tokens · I flattened input dims · O flattened output dims · L latents · X crosscoding positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from crosscode_kernels.aux_topk import autograd as aux_topk_op
from crosscode_kernels.aux_topk import spec as aux_topk_spec
from crosscode_kernels.decoder_norms import autograd as decoder_norms_op
from crosscode_kernels.decoder_norms import spec as decoder_norms_spec
from crosscode_kernels.encode_batch_topk import autograd as encode_batch_topk_op
from crosscode_kernels.encode_batch_topk import spec as encode_batch_topk_spec
from crosscode_kernels.encode_groupmax import autograd as encode_groupmax_op
from crosscode_kernels.encode_groupmax import spec as encode_groupmax_spec
from crosscode_kernels.encode_threshold import autograd as encode_threshold_op
from crosscode_kernels.encode_threshold import spec as encode_threshold_spec
from crosscode_kernels.encode_topk import autograd as encode_topk_op
from crosscode_kernels.encode_topk import spec as encode_topk_spec
from crosscode_kernels.jumprelu import autograd as jumprelu_op
from crosscode_kernels.jumprelu import spec as jumprelu_spec
from crosscode_kernels.jumprelu_penalties import autograd as jumprelu_penalties_op
from crosscode_kernels.jumprelu_penalties import spec as jumprelu_penalties_spec
from crosscode_kernels.opset import DecodeReconLoss, DecoderNorms, JumpReLUPenalties, NormMode, ReconLoss
from crosscode_kernels.pre_act import autograd as pre_act_op
from crosscode_kernels.pre_act import spec as pre_act_spec
from crosscode_kernels.recon_loss import autograd as recon_loss_op
from crosscode_kernels.recon_loss import spec as recon_loss_spec
from crosscode_kernels.sparse import DenseLatents, Latents
from crosscode_kernels.sparse_decode import autograd as sparse_decode_op
from crosscode_kernels.sparse_decode import decode_recon as decode_recon_op
from crosscode_kernels.sparse_decode import spec as sparse_decode_spec
from crosscode_kernels.weighted_l1 import autograd as weighted_l1_op
from crosscode_kernels.weighted_l1 import spec as weighted_l1_spec
from crosscode_kernels.weighted_tanh import autograd as weighted_tanh_op
from crosscode_kernels.weighted_tanh import spec as weighted_tanh_spec


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors of a product in the autocast dtype where autocast is on, as PyTorch's own products have them."""
    device = next(tensor.device.type for tensor in tensors if tensor is not None)
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


class FusedOpSet:
    """An `OpSet` over the kernels that are registered under `name`. Top-k encoders return `SparseLatents`."""

    name = "fused"

    @property
    def backend(self) -> str:
        """What registered ops are told: the name, and options where a backend has any."""
        return self.name

    # ---- encode and select
    def encode_topk(self, x_BI: Tensor, W_enc_LI: Tensor, b_enc_L: Tensor | None, k: int) -> Latents:
        x_BI, W_enc_LI, b_enc_L = autocast(x_BI, W_enc_LI, b_enc_L)
        encode_topk_spec.check(x_BI, W_enc_LI, b_enc_L, k)
        return encode_topk_op.encode_topk(x_BI, W_enc_LI, b_enc_L, None, k, self.backend)

    def encode_batch_topk(
        self, x_BI: Tensor, W_enc_LI: Tensor, b_enc_L: Tensor | None, k: int, rank_scale_L: Tensor | None = None
    ) -> Latents:
        x_BI, W_enc_LI, b_enc_L = autocast(x_BI, W_enc_LI, b_enc_L)
        encode_batch_topk_spec.check(x_BI, W_enc_LI, b_enc_L, k, rank_scale_L)
        return encode_batch_topk_op.encode_batch_topk(x_BI, W_enc_LI, b_enc_L, k, rank_scale_L, self.backend)

    def encode_groupmax(self, x_BI: Tensor, W_enc_LI: Tensor, b_enc_L: Tensor | None, k: int) -> Latents:
        x_BI, W_enc_LI, b_enc_L = autocast(x_BI, W_enc_LI, b_enc_L)
        encode_groupmax_spec.check(x_BI, W_enc_LI, b_enc_L, k)
        return encode_groupmax_op.encode_groupmax(x_BI, W_enc_LI, b_enc_L, None, k, self.backend)

    def encode_threshold(
        self,
        x_BI: Tensor,
        W_enc_LI: Tensor,
        b_enc_L: Tensor | None,
        threshold: Tensor,
        rank_scale_L: Tensor | None = None,
    ) -> Latents:
        x_BI, W_enc_LI, b_enc_L = autocast(x_BI, W_enc_LI, b_enc_L)
        encode_threshold_spec.check(x_BI, W_enc_LI, b_enc_L, threshold, rank_scale_L)
        h_BL = self.preacts(x_BI, W_enc_LI, b_enc_L)
        return encode_threshold_op.encode_threshold(h_BL, threshold, rank_scale_L)

    def aux_topk(self, x_BI: Tensor, W_enc_LI: Tensor, b_enc_L: Tensor | None, dead_mask_L: Tensor, k: int) -> Latents:
        x_BI, W_enc_LI, b_enc_L = autocast(x_BI, W_enc_LI, b_enc_L)
        aux_topk_spec.check(x_BI, W_enc_LI, b_enc_L, dead_mask_L, k)
        return aux_topk_op.aux_topk(x_BI, W_enc_LI, b_enc_L, dead_mask_L, k, self.backend)

    def preacts(self, x_BI: Tensor, W_enc_LI: Tensor, b_enc_L: Tensor | None) -> Tensor:
        x_BI, W_enc_LI, b_enc_L = autocast(x_BI, W_enc_LI, b_enc_L)
        pre_act_spec.check_preacts(x_BI, W_enc_LI, b_enc_L)
        return torch.nn.functional.linear(x_BI, W_enc_LI, b_enc_L)

    # ---- dense activations with their encoders
    def encode_relu(self, x_BI: Tensor, W_enc_LI: Tensor, b_enc_L: Tensor | None) -> Latents:
        return DenseLatents(self.relu(self.preacts(x_BI, W_enc_LI, b_enc_L)))

    def encode_jumprelu(
        self,
        x_BI: Tensor,
        W_enc_LI: Tensor,
        b_enc_L: Tensor | None,
        t_L: Tensor,
        eps: float,
        ste: Literal["anthropic", "gdm"],
    ) -> Latents:
        h_BL = self.preacts(x_BI, W_enc_LI, b_enc_L)
        return DenseLatents(self.jumprelu(h_BL, t_L, eps, ste), h_BL)

    def pre_act_penalty(self, latents: Latents, t_L: Tensor, n_L: Tensor, lambda_L: Tensor) -> Tensor:
        if isinstance(latents, DenseLatents) and latents.preacts_BL is not None:
            return self.pre_act(latents.preacts_BL, t_L, n_L, lambda_L)
        if latents.deficit_L is None:
            raise ValueError("pre_act_penalty: latents carry no pre-activations; must come from encode_jumprelu")
        dtype = latents.deficit_L.dtype
        coef_L = n_L.to(dtype) * lambda_L.detach().to(dtype)
        return torch.dot(latents.deficit_L, coef_L) / max(latents.batch_size, 1)

    # ---- decode
    def decode(self, latents: Latents, W_dec_LO: Tensor, b_dec_O: Tensor | None = None) -> Tensor:
        if isinstance(latents, DenseLatents):
            value_BL, W_dec_LO, b_dec_O = autocast(latents.value_BL, W_dec_LO, b_dec_O)
            sparse_decode_spec.check(DenseLatents(value_BL), W_dec_LO, b_dec_O)
            return torch.nn.functional.linear(value_BL, W_dec_LO.T, b_dec_O)
        value_N, W_dec_LO, b_dec_O = autocast(latents.value_N, W_dec_LO, b_dec_O)
        latents = replace(latents.with_int32(), value_N=value_N)
        sparse_decode_spec.check(latents, W_dec_LO, b_dec_O)
        return sparse_decode_op.sparse_decode(latents, W_dec_LO, b_dec_O, self.backend)

    # ---- dense activations
    def relu(self, h_BL: Tensor) -> Tensor:
        return h_BL.relu()

    def jumprelu(self, h_BL: Tensor, t_L: Tensor, eps: float, ste: Literal["anthropic", "gdm"]) -> Tensor:
        jumprelu_spec.check(h_BL, t_L, eps, ste)
        return jumprelu_op.jumprelu(h_BL, t_L, eps, ste, self.backend)

    # ---- norms, penalties, losses
    def decoder_norms(self, W_dec_LO: Tensor, segments: Sequence[int], mode: NormMode) -> DecoderNorms:
        decoder_norms_spec.check(W_dec_LO, segments, mode)
        return decoder_norms_op.decoder_norms(W_dec_LO, segments, mode, self.backend)

    def weighted_l1(self, latents: Latents, n_L: Tensor, lambda_L: Tensor) -> Tensor:
        latents = latents if isinstance(latents, DenseLatents) else latents.with_int32()
        weighted_l1_spec.check(latents, n_L, lambda_L)
        return weighted_l1_op.weighted_l1(latents, n_L, lambda_L, None, self.backend)

    def weighted_tanh(self, latents: Latents, n_L: Tensor, lambda_L: Tensor, c: float) -> Tensor:
        latents = latents if isinstance(latents, DenseLatents) else latents.with_int32()
        weighted_tanh_spec.check(latents, n_L, lambda_L, c)
        return weighted_tanh_op.weighted_tanh(latents, n_L, lambda_L, float(c), self.backend)

    def pre_act(self, h_BL: Tensor, t_L: Tensor, n_L: Tensor, lambda_L: Tensor) -> Tensor:
        pre_act_spec.check(h_BL, t_L, n_L, lambda_L)
        return pre_act_op.pre_act(h_BL, t_L, n_L, lambda_L, self.backend)

    def jumprelu_penalties(
        self,
        h_BL: Tensor,
        t_L: Tensor,
        n_L: Tensor,
        lambda_tanh_L: Tensor,
        lambda_pre_L: Tensor,
        *,
        eps: float,
        ste: Literal["anthropic", "gdm"],
        c: float,
    ) -> JumpReLUPenalties:
        jumprelu_penalties_spec.check(h_BL, t_L, n_L, lambda_tanh_L, lambda_pre_L, eps, ste, c)
        return jumprelu_penalties_op.jumprelu_penalties(
            h_BL, t_L, n_L, lambda_tanh_L, lambda_pre_L, eps, ste, c, self.backend
        )

    def recon_loss(self, y_BO: Tensor, target_BO: Tensor, segments: Sequence[int]) -> ReconLoss:
        loss, per_x_X, _ = self._recon_loss(y_BO, target_BO, segments)
        return ReconLoss(loss, per_x_X)

    def _recon_loss(self, y_BO: Tensor, target_BO: Tensor, segments: Sequence[int]) -> DecodeReconLoss:
        if y_BO.dtype != target_BO.dtype and torch.is_autocast_enabled(y_BO.device.type):
            y_BO, target_BO = y_BO.float(), target_BO.float()
        recon_loss_spec.check(y_BO, target_BO, segments)
        return recon_loss_op.recon_loss(y_BO, target_BO, segments, self.backend)

    def decode_recon_loss(
        self, latents: Latents, W_dec_LO: Tensor, b_dec_O: Tensor | None, target_BO: Tensor, segments: Sequence[int]
    ) -> DecodeReconLoss:
        autocasts = torch.is_autocast_enabled(target_BO.device.type)
        if isinstance(latents, DenseLatents) or autocasts or latents.value_N.shape[0] == 0:
            return self._recon_loss(self.decode(latents, W_dec_LO, b_dec_O), target_BO, segments)
        latents = latents.with_int32()
        sparse_decode_spec.check(latents, W_dec_LO, b_dec_O)
        recon_loss_spec.check_target(latents.batch_size, W_dec_LO, target_BO, segments)
        return decode_recon_op.decode_recon_loss(latents, W_dec_LO, b_dec_O, target_BO, segments, self.backend)
