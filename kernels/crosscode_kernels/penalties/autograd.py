"""Decoder-norm weighted penalties as registered ops, on dense and on sparse latents.

Axes: B tokens · L latents · N stored entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosscode_kernels.backend import Backend
from crosscode_kernels.checks import acc_dtype, check_float, check_per_latent
from crosscode_kernels.penalties import torch_impl
from crosscode_kernels.penalties.deferred import PenaltyGrad, PenaltyTerm
from crosscode_kernels.penalties.mixed import mixed_penalty
from crosscode_kernels.registration import Arguments, define_op, like
from crosscode_kernels.segments.autograd import order_of
from crosscode_kernels.sparse import DenseLatents, Latents, SparseLatents
from crosscode_kernels.sparse_decode.autograd import entries_of


def check_penalty(op: str, latents: Latents, n_L: Tensor, lambda_L: Tensor) -> None:
    check_float(op, latents=latents.value)
    check_per_latent(op, latents.value, latents.n_latents, n_L=n_L, lambda_L=lambda_L)


def penalty(latents: Latents, n_L: Tensor, lambda_L: Tensor, c: float | None, backend: Backend) -> Tensor:
    """`mean_B sum_l lambda_l tanh(c a_l n_l)`, or of `a_l n_l` where `c` is None."""
    if isinstance(latents, DenseLatents):
        if backend.name == "torch" and c is not None and isinstance(latents.active, SparseLatents):
            return mixed_penalty(latents.value_BL, n_L, latents.active, lambda_L.detach(), c)
        return _dense_penalty(latents.value_BL, n_L, lambda_L.detach(), c, backend=backend)[0]
    latents = latents.with_int32()
    entries = latents.entries(order_of(latents, backend))
    return _sparse_penalty(entries, n_L, lambda_L.detach(), c, backend=backend)


def _zero(value: Tensor) -> Tensor:
    return value.new_zeros((), dtype=acc_dtype(value.dtype))


def _dense_backward(a: Arguments, g: Tensor, _: Tensor | None) -> dict[str, Tensor | None]:
    def compute(*arguments: Tensor | float | None) -> Tensor:
        return _dense_penalty_backward(*arguments, backend=a.backend)

    term = PenaltyTerm(g, a.n_L, a.lambda_L, a.c)
    # Not while tracing, and not for a leaf, which would keep it; nor where gradients of it are wanted.
    waits = a.backend.name == "triton" and type(a.a_BL) is Tensor and not (a.a_BL.is_leaf or torch.is_grad_enabled())
    da_BL = PenaltyGrad.of(a.a_BL, term, compute) if waits else compute(g, a.a_BL, *term[1:])
    return {"a_BL": da_BL, "n_L": (g * a.slope_L).to(a.n_L.dtype)}


def _slope(a: Arguments) -> Tensor:
    return a.n_L.new_zeros(a.n_L.shape, dtype=acc_dtype(a.a_BL.dtype))


def _sparse_backward(a: Arguments, g: Tensor) -> dict[str, Tensor | None]:
    dvalue_N, dn_L = _sparse_penalty_backward(g, entries_of(a), a.n_L, a.lambda_L, a.c, backend=a.backend)
    return {"value_N": dvalue_N, "n_L": dn_L}


_dense_penalty_backward = define_op(
    torch_impl.dense_penalty_backward,
    empty=lambda a: torch.empty_like(a.a_BL) if a.a_BL.numel() == 0 else None,
    fake=lambda a: like(a.a_BL),
)
_dense_penalty = define_op(
    torch_impl.dense_penalty,
    empty=lambda a: (_zero(a.a_BL), _slope(a)) if a.a_BL.numel() == 0 else None,
    fake=lambda a: (_zero(a.a_BL), _slope(a)),
    saved=lambda a, output: {"a_BL": a.a_BL, "n_L": a.n_L, "lambda_L": a.lambda_L, "slope_L": output[1]},
    backward=_dense_backward,
)
_sparse_penalty_backward = define_op(
    torch_impl.sparse_penalty_backward,
    empty=lambda a: (torch.empty_like(a.value_N), torch.zeros_like(a.n_L)) if a.value_N.shape[0] == 0 else None,
    fake=lambda a: (torch.empty_like(a.value_N), torch.empty_like(a.n_L)),
)
_sparse_penalty = define_op(
    torch_impl.sparse_penalty,
    empty=lambda a: _zero(a.value_N) if a.value_N.shape[0] == 0 else None,
    fake=lambda a: _zero(a.value_N),
    saved=lambda a, _: {"n_L": a.n_L, "lambda_L": a.lambda_L, **entries_of(a)._asdict()},
    backward=_sparse_backward,
)
