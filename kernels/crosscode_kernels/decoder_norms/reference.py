"""decoder_norms, dense.

Axes: L latents · O flattened output dims · X crosscoding positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosscode_kernels.checks import acc_dtype


def decoder_norms(W_LO: Tensor, segments: list[int], joint: bool) -> tuple[Tensor, Tensor]:
    W_LO = W_LO.to(acc_dtype(W_LO.dtype))
    # `vector_norm` has gradient 0 at 0, which is what the door asks for.
    norms_LX = torch.stack([torch.linalg.vector_norm(part, dim=1) for part in W_LO.split(segments, dim=1)], dim=1)
    return norms_LX, torch.linalg.vector_norm(W_LO, dim=1) if joint else norms_LX.sum(1)
