"""encode_groupmax, dense.

Axes: B tokens · L latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosscode_kernels.selection.reference import groupmax_mask
from crosscode_kernels.sparse import DenseLatents


def encode_groupmax(h_BL: Tensor, k: int) -> DenseLatents:
    a_BL = h_BL.relu()
    kept_BL = groupmax_mask(a_BL.detach(), k) if k else torch.zeros_like(a_BL, dtype=torch.bool)
    return DenseLatents(a_BL.where(kept_BL, 0))
