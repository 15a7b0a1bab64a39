"""encode_batch_topk, dense.

Axes: B tokens · L latents.
"""

from __future__ import annotations

from torch import Tensor

from crosscode_kernels.selection.reference import batch_topk_mask, ranking
from crosscode_kernels.sparse import DenseLatents


def encode_batch_topk(h_BL: Tensor, k: int, rank_scale_L: Tensor | None) -> DenseLatents:
    a_BL = h_BL.relu()
    return DenseLatents(a_BL.where(batch_topk_mask(ranking(a_BL, rank_scale_L), k * a_BL.shape[0]), 0))
