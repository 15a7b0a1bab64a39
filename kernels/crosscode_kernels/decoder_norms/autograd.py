"""decoder_norms as a registered op.

Axes: L latents · O flattened output dims · X crosscoding positions.
"""

from __future__ import annotations

from torch import Tensor

from crosscode_kernels.checks import acc_dtype
from crosscode_kernels.decoder_norms import torch_impl
from crosscode_kernels.registration import Arguments, define_op, grad_or_zeros, like


def _fake(a: Arguments) -> tuple[Tensor, Tensor]:
    dtype, n_latents = acc_dtype(a.W_dec_LO.dtype), a.W_dec_LO.shape[0]
    return a.W_dec_LO.new_empty(n_latents, len(a.segments), dtype=dtype), a.W_dec_LO.new_empty(n_latents, dtype=dtype)


def _backward(a: Arguments, d_norms_LX: Tensor | None, d_n_L: Tensor | None) -> dict[str, Tensor | None]:
    grads = grad_or_zeros(d_norms_LX, a.norms_LX), grad_or_zeros(d_n_L, a.n_L)
    rest = (a.W_dec_LO, a.norms_LX, a.n_L, a.segments, a.joint)
    return {"W_dec_LO": _decoder_norms_backward(*grads, *rest, backend=a.backend)}


_decoder_norms_backward = define_op(torch_impl.decoder_norms_backward, fake=lambda a: like(a.W_dec_LO))
decoder_norms = define_op(
    torch_impl.decoder_norms,
    fake=_fake,
    saved=lambda a, output: {"W_dec_LO": a.W_dec_LO, "norms_LX": output[0], "n_L": output[1]},
    backward=_backward,
)
