"""Row blocks that stay in cache: how elementwise work on a dense batch is fused in stock ops.

Axes: B tokens · L latents · R rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

_BLOCK_ELEMENTS = 1 << 19


def row_blocks(h_BL: Tensor, n_elements: int = _BLOCK_ELEMENTS, fewest_rows: int = 1) -> Iterator[slice]:
    """Slices of rows to work through, each with all its passes before the next: about `n_elements` numbers, at least
    `fewest_rows`. On a GPU one block is the whole batch: there a pass is a kernel launch."""
    n_tokens, n_latents = h_BL.shape
    rows = n_tokens if h_BL.device.type != "cpu" else max(n_elements // max(n_latents, 1), fewest_rows)
    for start in range(0, n_tokens, max(rows, 1)):
        yield slice(start, min(start + rows, n_tokens))
