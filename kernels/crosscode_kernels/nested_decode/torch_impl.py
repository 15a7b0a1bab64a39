"""nested_decode in stock ops.

Axes: B tokens · S prefixes · O flattened output dims · L latents.
"""

from __future__ import annotations

from torch import Tensor

from crosscode_kernels.segments.torch_impl import token_sums
from crosscode_kernels.sparse import Entries


def nested_decode(entries: Entries, W_LO: Tensor, b_O: Tensor | None, n_prefixes: int) -> Tensor:
    """`entries` of `B * S` tokens: of each token those of one segment after the other."""
    y_SO = token_sums(entries, W_LO)
    y_BSO = y_SO.view(-1, n_prefixes, W_LO.shape[1])
    if b_O is not None:
        y_BSO[:, 0] += b_O
    for s in range(1, n_prefixes):
        y_BSO[:, s] += y_BSO[:, s - 1]
    return y_BSO
