"""What all sparse encoders share: registration, and their gradients.

Axes: B tokens · I flattened input dims · L latents · K entries per token · N stored entries.

Only kept positive values have a gradient, whatever selected them, so that the encoder's weight gradient is the same
segment sum as the decoder's; entries of value 0 are in no segment.
Saved for backward: x, W_enc, and the sparse batch with its transpose.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from crosscode_kernels.backend import Backend
from crosscode_kernels.encoder import Encoder
from crosscode_kernels.registration import Arguments, Kernel, define_op
from crosscode_kernels.segments.autograd import latent_order, weight_grad
from crosscode_kernels.sparse import Entries, LatentOrder, SparseLatents, padding_last
from crosscode_kernels.sparse_decode.autograd import entries_decode, entries_of


def define_encoder(kernel: Kernel, variants: Sequence[str] = ()) -> Callable[..., SparseLatents]:
    """Register an encoder of k entries per token, or of k * B in all. Its kernel takes an `Encoder` first and has an argument
    `k`; it returns latent_idx_BK and value_BK, or row_ptr_B1, latent_idx_N and value_N."""
    op = define_op(
        kernel,
        empty=lambda a: (
            _finish(a, (_int32(a, a.x_BI.shape[0], a.k), a.x_BI.new_empty(a.x_BI.shape[0], a.k)))
            if a.x_BI.shape[0] == 0 or a.k == 0
            else None
        ),
        finish=_finish,
        fake=_fake,
        extra={"with_order": bool},
        saved=lambda a, output: {"x_BI": a.x_BI, "W_enc_LI": a.W_enc_LI, **_entries(output)._asdict()},
        backward=lambda a, dvalue_N, *_: encode_grads(a.x_BI, a.W_enc_LI, entries_of(a), dvalue_N, a.needs, a.backend),
        variants=variants,
        n_results=len(Entries._fields),
    )

    def encode(encoder: Encoder, *arguments: Any, backend: Backend) -> SparseLatents:
        with_order = encoder.wants_weight_grad()
        entries = _entries(op(encoder, *arguments, with_order, backend=backend))
        order = LatentOrder(entries.order_N, entries.latent_ptr_L1) if with_order else None
        return SparseLatents(*entries[:3], encoder.W_enc_LI.shape[0], order, padded=True)

    return encode


def _int32(a: Arguments, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int32, device=a.x_BI.device)


def _entries(output: tuple[Tensor, ...]) -> Entries:
    value_N, row_ptr_B1, latent_idx_N, *order = output
    return Entries(row_ptr_B1, latent_idx_N, value_N, *order)


def _finish(a: Arguments, result: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The sparse batch, with its transpose where asked; what has a gradient first."""
    *rows, latent_idx, value = result
    row_ptr_B1 = rows[0] if rows else torch.arange(a.x_BI.shape[0] + 1, dtype=torch.int32, device=value.device) * a.k
    latent_idx_N, n_latents = latent_idx.view(-1), a.W_enc_LI.shape[0]
    order = (
        latent_order(padding_last(latent_idx_N, value.view(-1), n_latents), n_latents, backend=a.backend)
        if a.with_order
        else (_int32(a, 0), _int32(a, 0))
    )
    return value.view(-1), row_ptr_B1, latent_idx_N, *order


def _fake(a: Arguments) -> tuple[Tensor, ...]:
    n_tokens = a.x_BI.shape[0]
    n_entries = n_tokens * a.k
    n_order, n_ptr = (n_entries, a.W_enc_LI.shape[0] + 1) if a.with_order else (0, 0)
    value_N = a.x_BI.new_empty(n_entries)
    return value_N, _int32(a, n_tokens + 1), _int32(a, n_entries), _int32(a, n_order), _int32(a, n_ptr)


def encode_grads(
    x_BI: Tensor, W_enc_LI: Tensor, entries: Entries, dvalue_N: Tensor, needs: Collection[str], backend: Backend
) -> dict[str, Tensor | None]:
    """Gradients of x_BI, W_enc_LI and b_enc_L, as far as they are among `needs`."""
    # Written as "not positive is 0", so that NaN passes.
    entries = entries._replace(value_N=dvalue_N.masked_fill(entries.value_N <= 0, 0))
    dx_BI = dW_LI = db_L = None
    if "x_BI" in needs:
        dx_BI = entries_decode(entries, W_enc_LI, None, backend=backend)
    if "W_enc_LI" in needs or "b_enc_L" in needs:
        dW_LI, db_L = weight_grad(entries, x_BI, backend, want_sum="b_enc_L" in needs)
    return {
        "x_BI": dx_BI,
        "W_enc_LI": dW_LI if "W_enc_LI" in needs else None,
        "b_enc_L": db_L if "b_enc_L" in needs else None,
    }
