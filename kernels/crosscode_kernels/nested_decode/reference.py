"""nested_decode, dense.

Axes: B tokens · S prefixes · O flattened output dims · L latents.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crosscode_kernels.sparse import Latents


def nested_decode(latents: Latents, W_dec_LO: Tensor, b_dec_O: Tensor | None, sizes: Sequence[int]) -> Tensor:
    value_BL = latents.to_dense()
    outputs = [value_BL[:, :size] @ W_dec_LO[:size] for size in sizes]
    return torch.stack([y_BO if b_dec_O is None else y_BO + b_dec_O for y_BO in outputs], dim=1)
