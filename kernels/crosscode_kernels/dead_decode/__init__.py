"""dead_decode: what the k largest dead latents of each token add to the output (AuxK of Gao et al. 2024).

Axes: B tokens · I, O flattened input and output dims · L latents.

    y = aux_topk(x, W_enc, b_enc, dead_mask, k) W_dec

Shapes: x_BI, W_enc_LI, b_enc_L (optional), dead_mask_L (bool), W_dec_LO -> y_BO. Selection and ties: those of `aux_topk`.
Few latents are dead, so k of them are many: torch on a CPU takes dense products over dead latents alone where that is
cheaper. Gradients to W_enc and W_dec are then made row by row; with `sparse_grad` they are handed on as sparse COO tensors
over these rows, which PyTorch adds in place to the dense gradient of the main latents: no pass over the rest.
Errors (ValueError): those of `aux_topk` and `sparse_decode`.
"""

from __future__ import annotations

from torch import Tensor

from crosscode_kernels.aux_topk import aux_topk, check_dead
from crosscode_kernels.backend import AnyBackend, backend_for
from crosscode_kernels.dead_decode import torch_impl
from crosscode_kernels.encoder import autocast, checked_encoder, may_look
from crosscode_kernels.opset import door
from crosscode_kernels.sparse_decode import check_decoder, sparse_decode


@door
def dead_decode(
    x_BI: Tensor,
    W_enc_LI: Tensor,
    b_enc_L: Tensor | None,
    dead_mask_L: Tensor,
    k: int,
    W_dec_LO: Tensor,
    *,
    sparse_grad: bool = False,
    backend: AnyBackend = "auto",
) -> Tensor:
    """`sparse_decode(aux_topk(x, W_enc, b_enc, dead_mask, k), W_dec)`."""
    backend = backend_for(backend, x_BI)
    encoder, own_dtype = (x_BI, W_enc_LI, b_enc_L), W_enc_LI.dtype
    if backend.name == "torch" and may_look(x_BI):
        encoder = checked_encoder("dead_decode", backend, encoder)
        (W_dec_LO,) = autocast(backend, W_dec_LO)
        check_dead("dead_decode", encoder, dead_mask_L, k)
        check_decoder("dead_decode", encoder.W_enc_LI.shape[0], encoder.x_BI, W_dec_LO, None)
        dead_Q = dead_mask_L.nonzero().squeeze(1)
        if min(k, dead_Q.shape[0]) > backend.sparse_below * dead_Q.shape[0]:
            # PyTorch refuses to cast a sparse gradient back to the weight's own dtype.
            may_be_sparse = encoder.W_enc_LI.dtype == own_dtype and (sparse_grad or backend.is_row_sparse)
            return torch_impl.dead_decode(encoder, dead_Q, k, W_dec_LO, may_be_sparse)
    return sparse_decode(aux_topk(*encoder, dead_mask_L, k, backend=backend), W_dec_LO, backend=backend)
