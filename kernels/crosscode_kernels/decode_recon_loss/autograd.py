"""decode_recon as a registered op.

Axes: B tokens · O flattened output dims · L latents · X crosscoding positions · N stored entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosscode_kernels.decode_recon_loss import torch_impl
from crosscode_kernels.recon_loss.autograd import residual_grad, zero_loss
from crosscode_kernels.registration import Arguments, define_op
from crosscode_kernels.sparse_decode.autograd import decode_grads, entries_of

_WIDE = (torch.float32, torch.float64)


def _backward(a: Arguments, d_loss: Tensor | None, d_per_x_X: Tensor | None, _: None) -> dict[str, Tensor | None]:
    entries, residual_BO = entries_of(a), a.residual_BO
    if d_loss is not None and d_per_x_X is None and "target_BO" not in a.needs and a.W_LO.dtype in _WIDE:
        # The gradient of the output is one number times the residual: that number goes to the entries, no pass over B x O.
        # Not in half precision, where a scaled value may underflow that a scaled residual would not.
        scale = d_loss * (2 / max(residual_BO.shape[0], 1))
        scaled = entries._replace(value_N=entries.value_N * scale)
        grads = decode_grads(residual_BO, scaled, a.W_LO, a.needs, a.backend)
        return grads | {key: None if grads[key] is None else grads[key] * scale for key in ("value_N", "b_O")}
    dy_BO = residual_grad(d_loss, d_per_x_X, residual_BO, a.segments, a.backend)
    grads = decode_grads(dy_BO.to(a.W_LO.dtype), entries, a.W_LO, a.needs, a.backend)
    return grads | {"target_BO": -dy_BO if "target_BO" in a.needs else None}


decode_recon = define_op(
    torch_impl.decode_recon,
    empty=lambda a: zero_loss(a.target_BO, a.segments) if a.target_BO.shape[0] == 0 else None,
    finish=lambda a, result: (result[0].sum(), *result),
    fake=lambda a: zero_loss(a.target_BO, a.segments),
    saved=lambda a, output: {"residual_BO": output[2], "W_LO": a.W_LO, **entries_of(a)._asdict()},
    backward=_backward,
    n_results=3,
)
