"""TopK encode: the vendor's GEMM over a chunk of latents, then the streaming row select; nothing `B x L` is made.

Axes: B tokens · I input width · L latents · K kept per token · C candidates of all chunks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from crosscode_kernels.encoder import Encoder
from crosscode_kernels.selection.triton_impl import latent_chunks, preacts, row_topk


def encode_topk(encoder: Encoder, k: int) -> tuple[Tensor, Tensor]:
    return topk_in_chunks(encoder, k, preacts)


def topk_in_chunks(encoder: Encoder, k: int, preacts: Callable[[Encoder], Tensor]) -> tuple[Tensor, Tensor]:
    """The k largest of what `preacts` gives for some latents at a time, their ids ascending."""
    idx_parts: list[Tensor] = []
    value_parts: list[Tensor] = []
    for chunk in latent_chunks(encoder.x_BI.shape[0], encoder.W_enc_LI.shape[0]):
        h_BL = preacts(encoder.of_latents(chunk))
        idx_BK, value_BK = row_topk(h_BL, min(k, h_BL.shape[1]))
        idx_parts.append(idx_BK + chunk.start)
        value_parts.append(value_BK)
    if len(idx_parts) == 1:
        return idx_parts[0], value_parts[0]
    # Candidates are ascending by latent, so that the lowest index still wins among equals.
    idx_BC, value_BC = torch.cat(idx_parts, 1), torch.cat(value_parts, 1)
    column_BK, value_BK = row_topk(value_BC, k)
    return idx_BC.gather(1, column_BK.long()), value_BK
