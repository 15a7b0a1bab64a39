"""BatchTopK encode: the vendor's GEMM, then the select over the whole batch; pre-activations are freed with the call.

Axes: B tokens · I input width · L latents · N = k * B kept entries.
"""

from __future__ import annotations

from torch import Tensor

from crosscode_kernels.encoder import Encoder
from crosscode_kernels.selection.triton_batch import batch_topk
from crosscode_kernels.selection.triton_impl import preacts


def encode_batch_topk(encoder: Encoder, k: int, rank_scale_L: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return batch_topk(preacts(encoder), k * encoder.x_BI.shape[0], rank_scale_L)
