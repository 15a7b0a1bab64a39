"""nested_decode: a program walks the segments of a token and stores what it has summed up at the end of each.

Axes: B tokens · S prefixes · O width of a decoder row · L latents.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from crosscode_kernels.sparse import Entries
from crosscode_kernels.sparse_decode.triton_impl import gather_sum
from crosscode_kernels.triton_common.heuristics import decode_config
from crosscode_kernels.triton_common.launch import launch


@triton.jit
def _nested_decode_kernel(
    row_ptr, idx_ptr, value_ptr, W_ptr, b_ptr, y_ptr, n_prefixes, n_out, HAS_BIAS: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_O: tl.constexpr,
):  # fmt: skip
    first_row = tl.program_id(0).to(tl.int64) * n_prefixes
    offs_o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    mask_o = offs_o < n_out
    y = tl.zeros([BLOCK_O], dtype=tl.float32)
    if HAS_BIAS:
        y += tl.load(b_ptr + offs_o, mask=mask_o, other=0.0).to(tl.float32)
    for s in range(0, n_prefixes):
        row = first_row + s
        y += gather_sum(row_ptr, idx_ptr, value_ptr, W_ptr, row, offs_o, mask_o, n_out, BLOCK_K, BLOCK_O)  # [BLOCK_O]
        tl.store(y_ptr + row * n_out + offs_o, y, mask=mask_o)


def nested_decode(entries: Entries, W_LO: Tensor, b_O: Tensor | None, n_prefixes: int) -> Tensor:
    n_tokens, (n_latents, width) = entries.n_tokens // n_prefixes, W_LO.shape
    y_BSO = entries.value_N.new_empty(n_tokens, n_prefixes, width)
    config = decode_config(n_latents, width, W_LO.element_size())
    launch(
        _nested_decode_kernel, (n_tokens, triton.cdiv(width, config.BLOCK_O)), *entries[:3], W_LO,
        W_LO if b_O is None else b_O, y_BSO, n_prefixes, width, HAS_BIAS=b_O is not None, BLOCK_K=config.BLOCK_K,
        BLOCK_O=config.BLOCK_O, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return y_BSO
