"""Several weights whose rows are windows of one output, as kernels find their way among them.

Axes: B tokens · S groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Groups(NamedTuple):
    """Several weights, of as many latents each, whose rows are windows of one output. Their `Entries` are concatenated: indices
    and bounds stay those of each. `table_S5` (int64): a group's first entry; where its W begins, in numbers from the first
    group's; its window's first column and width; where its gradient begins in one array of `n_weights` numbers. `align` divides
    all of these but the first."""

    table_S5: Tensor
    n_latents: int
    widest: int
    n_weights: int
    align: int
    W_S: Sequence[Tensor]


@triton.jit
def group_of(table_ptr, group, ALIGN: tl.constexpr):
    """A row of the table of `Groups`."""
    here = table_ptr + group * 5
    W_offset = tl.multiple_of(tl.load(here + 1), ALIGN)
    first_column = tl.multiple_of(tl.load(here + 2).to(tl.int32), ALIGN)
    width = tl.multiple_of(tl.load(here + 3).to(tl.int32), ALIGN)
    return tl.load(here), W_offset, first_column, width, tl.multiple_of(tl.load(here + 4), ALIGN)
