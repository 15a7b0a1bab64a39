"""grouped_decode, dense.

Axes: B tokens · S dictionaries · O flattened output dims · L latents.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crosscode_kernels.sparse import Latents
from crosscode_kernels.sparse_decode import reference


def grouped_decode(
    latents_S: Sequence[Latents], W_S: Sequence[Tensor], b_dec_O: Tensor | None, first_S: Sequence[int], n_out: int
) -> Tensor:
    y_SBO = []
    for latents, W_LO, first in zip(latents_S, W_S, first_S, strict=True):
        y_BO = reference.sparse_decode(latents, W_LO, None)
        y_SBO.append(torch.nn.functional.pad(y_BO, (first, n_out - first - W_LO.shape[1])))
    y_BO = torch.stack(y_SBO).sum(0)
    return y_BO if b_dec_O is None else y_BO + b_dec_O
