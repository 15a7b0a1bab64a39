"""sparse_decode in stock ops: sums of decoder rows by token, and both gradients.

Axes: B tokens · O flattened output dims · L latents · N stored entries.
"""

from __future__ import annotations

from torch import Tensor

from crosscode_kernels.segments.torch_impl import pair_dots, segment_rows, token_sums
from crosscode_kernels.sparse import Entries


def sparse_decode(entries: Entries, W_LO: Tensor, b_O: Tensor | None) -> Tensor:
    y_BO = token_sums(entries, W_LO)
    return y_BO if b_O is None else y_BO.add_(b_O)


def gather_dot(entries: Entries, dy_BO: Tensor, W_LO: Tensor) -> Tensor:
    """`dot_N = dy[token(n)] . W[latent(n)]`."""
    return pair_dots(entries, dy_BO, W_LO)


def sparse_decode_backward(entries: Entries, dy_BO: Tensor, W_LO: Tensor) -> tuple[Tensor, Tensor]:
    """`dvalue_N, dW_LO`."""
    return pair_dots(entries, dy_BO, W_LO), segment_rows(entries, dy_BO)[0]
