"""encode_topk, dense.

Axes: B tokens · L latents.
"""

from __future__ import annotations

from torch import Tensor

from crosscode_kernels.selection.reference import topk_mask
from crosscode_kernels.sparse import DenseLatents


def encode_topk(h_BL: Tensor, k: int) -> DenseLatents:
    a_BL = h_BL.relu()
    return DenseLatents(a_BL.where(topk_mask(a_BL.detach(), k), 0))
