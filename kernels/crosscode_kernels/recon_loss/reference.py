"""recon_loss, dense.

Axes: B tokens · O flattened output dims · X crosscoding positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crosscode_kernels.checks import acc_dtype


def recon_loss(y_BO: Tensor, target_BO: Tensor, segments: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    dtype = acc_dtype(y_BO.dtype)
    error_BO = y_BO.to(dtype) - target_BO.to(dtype)
    parts = error_BO.split(list(segments), dim=1)
    per_x_X = torch.stack([part.square().sum() for part in parts]) / max(y_BO.shape[0], 1)
    return per_x_X.sum(), per_x_X, error_BO
