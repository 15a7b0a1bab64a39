"""encode_groupmax in stock ops.

Axes: B tokens · I flattened input dims · L latents · K groups, one entry each · G latents of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosscode_kernels.encode_topk.torch_impl import dense_preacts
from crosscode_kernels.encoder import Encoder


def encode_groupmax(encoder: Encoder, k: int) -> tuple[Tensor, Tensor]:
    h_BKG = dense_preacts(encoder).view(encoder.x_BI.shape[0], k, -1)
    # `max` along a dimension returns the first of several equal maxima, and NaN where there is one.
    value_BK, within_BK = h_BKG.max(dim=2)
    first_K = torch.arange(k, device=encoder.x_BI.device) * h_BKG.shape[2]
    return (within_BK + first_K).int(), value_BK.relu_()
