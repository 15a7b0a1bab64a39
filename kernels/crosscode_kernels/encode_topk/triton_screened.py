"""encode_topk with pre-activations screened in bfloat16, for Triton: what `screened` proves, and rows that fail on the device.

Axes: B tokens · I flattened input dims · L latents · K kept per token · C candidates per token.

The bounds are the vendor's bfloat16 product, with sums in float32; candidates are selected from them, and multiplied in
float32 with the tokens' rows in order of latents. Rows without proof are few, and known on the device only: a product over
capacity whose programs end at once makes them, so that nothing waits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from crosscode_kernels.aux_topk.triton_impl import compact, topk_of_tokens
from crosscode_kernels.encode_topk.screened import candidates_for, proven_rows, rounded_up, upper_bounds
from crosscode_kernels.encode_topk.triton_impl import encode_topk, topk_in_chunks
from crosscode_kernels.encoder import Encoder
from crosscode_kernels.segments.triton_impl import latent_order
from crosscode_kernels.selection.triton_impl import row_topk
from crosscode_kernels.sparse import LatentOrder, SparseLatents
from crosscode_kernels.sparse_decode.triton_impl import gather_dot


@contextmanager
def _sums_in_float32() -> Iterator[None]:
    """cuBLAS may round partial sums to bfloat16 unless it is told not to, and the bound does not cover that."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before


def encode_topk_screened(encoder: Encoder, k: int) -> tuple[Tensor, Tensor]:
    """As that of `triton_impl`. Other dtypes than float32, and few latents, take the dense way."""
    n_candidates = candidates_for(k, encoder)
    if n_candidates == 0:
        return encode_topk(encoder, k)
    x_BI, W_enc_LI, b_enc_L = encoder
    norms: list[Tensor] = []

    def bounds(part: Encoder) -> Tensor:
        bound_BL, largest_norm = upper_bounds(part)
        norms.append(largest_norm)
        return bound_BL

    with _sums_in_float32():
        latent_idx_BC, bound_BC = topk_in_chunks(encoder, n_candidates, bounds)
    value_BC = x_BI.new_empty(latent_idx_BC.shape)
    latents = SparseLatents.from_topk(latent_idx_BC, value_BC, W_enc_LI.shape[0])
    order = LatentOrder(*latent_order(latents.latent_idx_N, latents.n_latents))
    value_BC = gather_dot(latents.entries(order), x_BI, W_enc_LI).view(value_BC.shape)
    if b_enc_L is not None:
        value_BC = value_BC + b_enc_L[latent_idx_BC]
    column_BK, value_BK = row_topk(value_BC, k)
    latent_idx_BK = latent_idx_BC.gather(1, column_BK.long())
    largest_norm = torch.stack(norms).amax()
    failed_B = ~proven_rows(x_BI, largest_norm, rounded_up(bound_BC.amin(1)), value_BK.amin(1))
    tokens_C, n_failed = compact(failed_B)
    redone_CK = topk_of_tokens(encoder, tokens_C[:-1], n_failed, k)
    slot_B = (torch.cumsum(failed_B, 0) - 1).clamp_(min=0)
    idx_BK, redone_BK = (part_CK.index_select(0, slot_B) for part_CK in redone_CK)
    failed_B1 = failed_B[:, None]
    return torch.where(failed_B1, idx_BK, latent_idx_BK), torch.where(failed_B1, redone_BK, value_BK)
