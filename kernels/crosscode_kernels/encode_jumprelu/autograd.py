"""encode_jumprelu on dense tensors as a registered op, from pre-activations that are already there.

Axes: B tokens · I flattened input dims · L latents.

The pre-activations are an argument without gradient, so that a backend may look at them before it chooses this op; the
gradients to x, W_enc and b_enc are those of the product that made them. Saved for backward: x, W_enc, h, t, and a, by which a
gradient is known to be one of it (the decoder keeps it anyway).
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosscode_kernels.checks import acc_dtype
from crosscode_kernels.encode_jumprelu import torch_impl
from crosscode_kernels.penalties.deferred import PenaltyTerm, taken
from crosscode_kernels.registration import Arguments, define_op, like


def _backward(
    a: Arguments, da_BL: Tensor | None, d_deficit_L: Tensor | None, _: Tensor | None
) -> dict[str, Tensor | None]:
    da_BL, term = (None, PenaltyTerm()) if da_BL is None else taken(da_BL, a.a_BL)
    da_BL = torch.zeros_like(a.h_BL) if da_BL is None else da_BL
    dh_BL, dt_L, db_L = backward_op(da_BL, d_deficit_L, a.h_BL, a.t_L, a.eps, a.gdm, term, backend=a.backend)
    return {
        "t_L": dt_L,
        "x_BI": dh_BL @ a.W_enc_LI if "x_BI" in a.needs else None,
        "W_enc_LI": dh_BL.T @ a.x_BI if "W_enc_LI" in a.needs else None,
        "b_enc_L": db_L if "b_enc_L" in a.needs else None,
    }


def _sums(a: Arguments) -> tuple[Tensor, Tensor]:
    zeros_L = a.h_BL.new_zeros(a.h_BL.shape[1], dtype=acc_dtype(a.h_BL.dtype))
    return zeros_L, zeros_L.long()


backward_op = define_op(
    torch_impl.encode_jumprelu_backward,
    empty=lambda a: (
        (torch.empty_like(a.h_BL), torch.zeros_like(a.t_L), a.h_BL.new_zeros(a.t_L.shape))
        if a.h_BL.numel() == 0
        else None
    ),
    fake=lambda a: (like(a.h_BL), torch.empty_like(a.t_L), a.h_BL.new_empty(a.t_L.shape)),
)
encode_jumprelu = define_op(
    torch_impl.encode_jumprelu,
    extra={"x_BI": Tensor, "W_enc_LI": Tensor, "b_enc_L": Tensor | None, "eps": float, "gdm": bool},
    empty=lambda a: (torch.empty_like(a.h_BL), *_sums(a)) if a.h_BL.numel() == 0 else None,
    fake=lambda a: (like(a.h_BL), *_sums(a)),
    saved=lambda a, output: {
        "x_BI": a.x_BI,
        "W_enc_LI": a.W_enc_LI,
        "h_BL": a.h_BL,
        "t_L": a.t_L,
        "a_BL": output[0],
    },
    backward=_backward,
)
