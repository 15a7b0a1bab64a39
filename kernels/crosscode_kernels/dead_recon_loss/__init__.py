"""dead_recon_loss: what is left of an error once the k largest dead latents of each token have added to the output (AuxK of Gao
et al. 2024).

Axes: B tokens · I, O flattened input and output dims · L latents.

    loss = (1 / B) ||residual + aux_topk(x, W_enc, b_enc, dead_mask, k) W_dec||^2

Shapes: x_BI, W_enc_LI, b_enc_L (optional), dead_mask_L (bool), W_dec_LO, residual_BO = y - target (no gradient) -> a scalar,
float32 (float64 for float64). Selection and ties: those of `aux_topk`.
Few latents are dead, so k of them are many: torch on a CPU takes dense products over dead latents alone where that is
cheaper. Gradients to W_enc and W_dec are then made row by row; with `sparse_grad` they are handed on as sparse COO tensors
over these rows, which PyTorch adds in place to the dense gradient of the main latents: no pass over the rest.
Errors (ValueError): those of `aux_topk` and `decode_recon_loss`.
"""

from __future__ import annotations

from torch import Tensor

from crosscode_kernels.aux_topk import aux_topk, check_dead
from crosscode_kernels.backend import AnyBackend, backend_for
from crosscode_kernels.dead_recon_loss import torch_impl
from crosscode_kernels.decode_recon_loss import check_target, decode_recon_loss
from crosscode_kernels.encoder import autocast, checked_encoder, may_look
from crosscode_kernels.opset import door
from crosscode_kernels.sparse_decode import check_decoder


@door
def dead_recon_loss(
    x_BI: Tensor,
    W_enc_LI: Tensor,
    b_enc_L: Tensor | None,
    dead_mask_L: Tensor,
    k: int,
    W_dec_LO: Tensor,
    residual_BO: Tensor,
    *,
    sparse_grad: bool = False,
    backend: AnyBackend = "auto",
) -> Tensor:
    """`decode_recon_loss(aux_topk(x, W_enc, b_enc, dead_mask, k), W_dec, None, -residual, [O]).loss`."""
    backend, residual_BO = backend_for(backend, x_BI), residual_BO.detach()
    encoder, own_dtype = (x_BI, W_enc_LI, b_enc_L), W_enc_LI.dtype
    if backend.name == "torch" and may_look(x_BI):
        encoder = checked_encoder("dead_recon_loss", backend, encoder)
        (weight_LO,) = autocast(backend, W_dec_LO)
        check_dead("dead_recon_loss", encoder, dead_mask_L, k)
        check_decoder("dead_recon_loss", encoder.W_enc_LI.shape[0], encoder.x_BI, weight_LO, None)
        check_target("dead_recon_loss", "residual_BO", residual_BO, x_BI.shape[0], weight_LO)
        dead_Q = dead_mask_L.nonzero().squeeze(1)
        if min(k, dead_Q.shape[0]) > backend.sparse_below * dead_Q.shape[0]:
            # PyTorch refuses to cast a sparse gradient back to the weight's own dtype.
            may_be_sparse = encoder.W_enc_LI.dtype == own_dtype and (sparse_grad or backend.is_row_sparse)
            return torch_impl.dead_recon_loss(encoder, dead_Q, k, weight_LO, residual_BO, may_be_sparse)
    latents = aux_topk(*encoder, dead_mask_L, k, backend=backend)
    return decode_recon_loss(latents, W_dec_LO, None, -residual_BO, [residual_BO.shape[1]], backend=backend).loss
