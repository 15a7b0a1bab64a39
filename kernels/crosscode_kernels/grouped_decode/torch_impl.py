"""grouped_decode in stock ops: dictionary by dictionary, added into its window.

Axes: B tokens · S dictionaries · O flattened output dims · L latents of each · N stored entries of all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from crosscode_kernels.segments.torch_impl import pair_dots, segment_rows, token_sums
from crosscode_kernels.sparse import Entries


def entries_of_each(entries: Entries, count_S: Sequence[int]) -> Iterator[Entries]:
    """The batch of each dictionary, from one behind the other (see `autograd.joined_decode`); each has so many entries."""
    n, counts, order_N = len(count_S), list(count_S), entries.order_N
    return map(
        Entries,
        entries.row_ptr_B1.chunk(n),
        entries.latent_idx_N.split(counts),
        entries.value_N.split(counts),
        order_N.split(counts) if order_N.shape[0] else order_N.chunk(n),
        entries.latent_ptr_L1.chunk(n),
    )


def grouped_decode(
    entries: Entries, count_S: list[int], W_S: list[Tensor], b_O: Tensor | None, first_S: list[int], n_out: int
) -> Tensor:
    own_S = entries_of_each(entries, count_S)
    return window_sums([token_sums(own, W_LO) for own, W_LO in zip(own_S, W_S, strict=True)], b_O, first_S, n_out)


def grouped_backward(
    entries: Entries, count_S: list[int], dy_BO: Tensor, W_S: list[Tensor], first_S: list[int], want_W: bool
) -> tuple[Tensor, Tensor]:
    """`dvalue_N`, and where wanted the gradients of all dictionaries in one array."""
    dots, found = [], [dy_BO.new_empty(0)]
    for own, W_LO, first in zip(entries_of_each(entries, count_S), W_S, first_S, strict=True):
        rows_BO = dy_BO[:, first : first + W_LO.shape[1]].contiguous()
        dots.append(pair_dots(own, rows_BO, W_LO))
        if want_W:
            found.append(segment_rows(own, rows_BO)[0].flatten())
    return torch.cat(dots), torch.cat(found)


def window_sums(y_SBO: list[Tensor], b_O: Tensor | None, first_S: list[int], n_out: int) -> Tensor:
    y_BO = y_SBO[0].new_zeros(y_SBO[0].shape[0], n_out)
    for first, part_BO in zip(first_S, y_SBO, strict=True):
        y_BO[:, first : first + part_BO.shape[1]] += part_BO
    return y_BO if b_O is None else y_BO.add_(b_O)
