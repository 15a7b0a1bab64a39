"""AuxK encode: only the rows of dead latents are multiplied, by a GEMM that gathers them; then the row select.

Axes: B tokens · I input width · L latents · C dead latents, compacted (capacity L) · K kept per token.

How many latents are dead is known on the device only: grids cover the capacity, and a program whose columns lie beyond
the number of dead latents ends at once. Without dead latents the op costs its launches.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from crosscode_kernels.encoder import Encoder
from crosscode_kernels.selection.triton_impl import row_topk, token_chunks
from crosscode_kernels.triton_common.heuristics import dead_gemm_config
from crosscode_kernels.triton_common.launch import INTERPRETED, launch

_TOKENS_AT_ONCE = 128


@triton.jit
def _dead_preacts_kernel(
    x_ptr, W_ptr, b_ptr, dead_ptr, n_dead_ptr, h_ptr, B, n_in, C, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """`h[b, c] = x[b] . W[dead_c] + b[dead_c]`; what lies beyond column `n_dead` means nothing."""
    first_c = tl.program_id(1) * BLOCK_C
    n_dead = tl.load(n_dead_ptr)
    if first_c >= n_dead:
        return
    offs_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    offs_c = first_c + tl.arange(0, BLOCK_C)
    mask_b = offs_b < B
    mask_c = offs_c < n_dead
    latent = tl.load(dead_ptr + offs_c, mask=mask_c, other=0).to(tl.int64)
    acc = tl.zeros([BLOCK_B, BLOCK_C], dtype=tl.float32)
    for first_i in range(0, n_in, BLOCK_I):
        offs_i = first_i + tl.arange(0, BLOCK_I)
        mask_i = offs_i < n_in
        x = tl.load(
            x_ptr + offs_b[:, None] * n_in + offs_i[None, :], mask=mask_b[:, None] & mask_i[None, :], other=0.0
        )  # [BLOCK_B, BLOCK_I]
        w = tl.load(
            W_ptr + latent[:, None] * n_in + offs_i[None, :], mask=mask_c[:, None] & mask_i[None, :], other=0.0
        )  # [BLOCK_C, BLOCK_I]
        if WIDEN:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(b_ptr + latent, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    tl.store(h_ptr + offs_b[:, None] * C + offs_c[None, :], acc, mask=mask_b[:, None] & (offs_c < C)[None, :])


def compact(mask_L: Tensor) -> tuple[Tensor, Tensor]:
    """Indices where the mask holds, ascending, then garbage up to capacity L; and their number. Both int32."""
    n_latents = mask_L.shape[0]
    slot_L = torch.where(mask_L, torch.cumsum(mask_L, 0) - 1, n_latents)
    ids_L = torch.arange(n_latents, dtype=torch.int32, device=mask_L.device)
    dead_C = ids_L.new_zeros(n_latents + 1).scatter_(0, slot_L, ids_L)
    return dead_C, mask_L.sum(dtype=torch.int32)


def precision_of(x_BI: Tensor) -> str:
    """fp32 products follow the user's setting for fp32 matrix products."""
    if not x_BI.is_cuda or torch.version.hip is not None:
        return "ieee"
    # Where PyTorch has the newer of its two settings, that one holds what was said in either; reading the older one raises
    # once the newer was written.
    matmul = torch.backends.cuda.matmul
    tf32 = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if tf32 else "ieee"


def _preacts_of(encoder: Encoder, ids_C: Tensor, n_ids: Tensor, precision: str) -> Tensor:
    """`h_BC` of the first `n_ids` (on the device) of these latents; what lies beyond means nothing."""
    x_BI, W_enc_LI, b_enc_L = encoder
    (n_tokens, width), capacity = x_BI.shape, W_enc_LI.shape[0]
    config, h_BC = dead_gemm_config(width, x_BI.element_size()), x_BI.new_empty(n_tokens, capacity)
    launch(
        _dead_preacts_kernel, (triton.cdiv(n_tokens, config.BLOCK_B), triton.cdiv(capacity, config.BLOCK_C)), x_BI,
        W_enc_LI, W_enc_LI if b_enc_L is None else b_enc_L, ids_C, n_ids, h_BC, n_tokens, width, capacity,
        HAS_BIAS=b_enc_L is not None, PRECISION=precision, WIDEN=INTERPRETED, BLOCK_B=config.BLOCK_B,
        BLOCK_C=config.BLOCK_C, BLOCK_I=config.BLOCK_I, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return h_BC


def topk_of_tokens(encoder: Encoder, tokens_C: Tensor, n_tokens: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`encode_topk` of the first `n_tokens` (on the device) of these tokens, float32 products in full; the rest of the rows is
    zeros. `_TOKENS_AT_ONCE` at a time, and where there are none left only the launches cost."""
    n_latents, parts = encoder.W_enc_LI.shape[0], list[tuple[Tensor, Tensor]]()
    latents_L = torch.arange(n_latents, dtype=torch.int32, device=tokens_C.device)
    for start in range(0, tokens_C.shape[0], _TOKENS_AT_ONCE):
        ids_R = tokens_C[start : start + _TOKENS_AT_ONCE]
        limit_R = (torch.arange(start, start + ids_R.shape[0], device=ids_R.device) < n_tokens).int() * n_latents
        some = encoder._replace(x_BI=encoder.x_BI.index_select(0, ids_R))
        parts.append(row_topk(_preacts_of(some, latents_L, limit_R[:1], "ieee"), k, limit=limit_R))
    column_CK, value_CK = (torch.cat(part) for part in zip(*parts, strict=True))
    return column_CK, value_CK


def aux_topk(encoder: Encoder, dead_mask_L: Tensor, k: int) -> tuple[Tensor, Tensor]:
    x_BI, n_latents = encoder.x_BI, encoder.W_enc_LI.shape[0]
    dead_C, n_dead = compact(dead_mask_L)
    parts: list[tuple[Tensor, Tensor]] = []
    for chunk in token_chunks(x_BI.shape[0], n_latents):
        h_BC = _preacts_of(encoder._replace(x_BI=x_BI[chunk]), dead_C, n_dead, precision_of(x_BI))
        parts.append(row_topk(h_BC, k, limit=n_dead))
    column_BK, value_BK = (torch.cat(part) for part in zip(*parts, strict=True))
    stored_K = torch.arange(k, device=x_BI.device) < n_dead
    return torch.where(stored_K, dead_C[column_BK], 0), value_BK
