"""encode_topk with pre-activations screened in bfloat16: exact, and it proves so for each row.

Axes: B tokens · I flattened input dims · L latents · K kept per token · C candidates per token · A I with its extra columns.

A bfloat16 product bounds every pre-activation from above. The C latents with the largest bounds are computed in float32;
if the C-th bound is below the K-th of these values, no other latent can belong to the K largest. Rows where that does not
hold are computed densely.

The bound, for x = x' + dx and W = W' + dW rounded to bfloat16 (primes) with remainders (d):

    h = x' . W' + dx . W + x' . dW + b  <=  x' . W' + |dx| |W| + |x'| |dW| + b

Its last three terms are three further columns of the product, each rounded upwards. `_ACCUMULATION` covers the rounding of
float32 sums of any order, in the product and in the values that it is compared with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosscode_kernels import host_buffers
from crosscode_kernels.encode_topk.torch_impl import encode_topk as dense_encode_topk
from crosscode_kernels.encoder import Encoder
from crosscode_kernels.segments.torch_impl import latent_order, pair_dots
from crosscode_kernels.selection.torch_impl import first_k_of_equal, topk_in_groups
from crosscode_kernels.sparse import LatentOrder, SparseLatents

_EPS_BF16 = 2.0**-8
_ROUND_UP = 1 + 2 * _EPS_BF16
_ACCUMULATION = 2.0**-22
_CHUNK_ELEMENTS, _CHUNK_ELEMENTS_ON_GPU = 3 << 19, 1 << 26
_EXTRA_COLUMNS = 32
_LARGEST_PRODUCT = 1e30


def encode_topk_screened(encoder: Encoder, k: int) -> tuple[Tensor, Tensor]:
    """As that of `torch_impl`. Other dtypes than float32, other devices and few latents take the dense way."""
    x_BI = encoder.x_BI
    n_candidates = candidates_for(k, encoder)
    if n_candidates == 0 or x_BI.device.type != "cpu":
        return dense_encode_topk(encoder, k)
    bound_BL, largest_norm = upper_bounds(encoder)
    latent_idx_BC, last_bound_B = _largest_bounds(bound_BL, n_candidates)
    value_BC = _exact_values(encoder, latent_idx_BC)
    value_BK, latent_idx_BK = first_k_of_equal(value_BC, latent_idx_BC, k)
    proven_B = proven_rows(x_BI, largest_norm, last_bound_B, value_BK[:, -1])
    redo_R = (~proven_B).nonzero().squeeze(1)
    if redo_R.shape[0]:
        latent_idx_BK[redo_R], value_BK[redo_R] = dense_encode_topk(encoder._replace(x_BI=x_BI[redo_R]), k)
    return latent_idx_BK, value_BK


def candidates_for(k: int, encoder: Encoder) -> int:
    """How many: too few and rows fail their proof; the bound's slack grows with the root of the width. 0: encode densely."""
    n_latents, width = encoder.W_enc_LI.shape
    n_candidates = k + max(16, int(1.5 * k * (width / 1536) ** 0.5))
    return 0 if encoder.x_BI.dtype != torch.float32 or 8 * n_candidates > n_latents else n_candidates


def proven_rows(x_BI: Tensor, largest_norm: Tensor, last_bound_B: Tensor, kth_value_B: Tensor) -> Tensor:
    """Rows in which everything that is bounded by `last_bound_B` lies below the k-th value."""
    finite_B = torch.linalg.vector_norm(x_BI, dim=1) * largest_norm < _LARGEST_PRODUCT
    return finite_B & ((last_bound_B < kth_value_B) | (last_bound_B <= 0))


def rounded_up(bound_B: Tensor) -> Tensor:
    """An upper bound of what was rounded to this bfloat16 number, in float32."""
    bound_B = bound_B.float()
    return bound_B + bound_B.abs() * 2 * _EPS_BF16


def upper_bounds(encoder: Encoder) -> tuple[Tensor, Tensor]:
    """Bounds of all pre-activations before their own rounding to bfloat16, and the largest norm of an encoder row (inf or
    NaN where any weight or bias is)."""
    x_BI, W_enc_LI, b_enc_L = encoder
    (n_tokens, width), n_latents = x_BI.shape, W_enc_LI.shape[0]
    slack = (width + _EXTRA_COLUMNS) * _ACCUMULATION
    x_BA = x_BI.new_zeros(n_tokens, width + _EXTRA_COLUMNS, dtype=torch.bfloat16)
    x_BA[:, :width] = x_BI
    x_norm_B = torch.linalg.vector_norm(x_BI, dim=1)
    dx_norm_B = torch.linalg.vector_norm(x_BI - x_BA[:, :width], dim=1)
    # |x'| <= |x| + |dx|; the slack stands for |x| |W| times the relative error of a float32 sum.
    x_BA[:, width] = (dx_norm_B + slack * x_norm_B) * _ROUND_UP
    x_BA[:, width + 1] = (x_norm_B + dx_norm_B) * _ROUND_UP
    x_BA[:, width + 2 : width + 4] = 1
    bound_BL = host_buffers.empty((n_tokens, n_latents), x_BA)
    largest = x_BI.new_zeros(())
    at_once = _CHUNK_ELEMENTS if x_BI.device.type == "cpu" else _CHUNK_ELEMENTS_ON_GPU
    chunk = min(max(at_once // max(width, 1), 64), n_latents)
    W_chunk = x_BA.new_zeros(chunk, width + _EXTRA_COLUMNS)
    for start in range(0, n_latents, chunk):
        W_lI = W_enc_LI[start : start + chunk]
        W_lA = W_chunk[: W_lI.shape[0]]
        W_lA[:, :width] = W_lI
        norm_l = torch.linalg.vector_norm(W_lI, dim=1)
        W_lA[:, width] = norm_l * _ROUND_UP
        W_lA[:, width + 1] = torch.linalg.vector_norm(W_lI - W_lA[:, :width], dim=1) * _ROUND_UP
        largest = torch.maximum(largest, norm_l.max())
        if b_enc_L is not None:
            b_l = b_enc_L[start : start + chunk]
            W_lA[:, width + 2] = b_l
            W_lA[:, width + 3] = b_l - W_lA[:, width + 2].float() + b_l.abs() * _EPS_BF16**2 * 4
            largest = torch.maximum(largest, b_l.abs().max())
        torch.mm(x_BA, W_lA.T, out=bound_BL[:, start : start + W_lI.shape[0]])
    return bound_BL, largest


def _largest_bounds(bound_BL: Tensor, n_candidates: int) -> tuple[Tensor, Tensor]:
    """Latents with the largest bounds of each row, and an upper bound of everything that is not among them."""
    # Positive bfloat16 numbers are ordered like their bits; negative ones cannot be kept, whatever their order.
    bits_BC, latent_idx_BC = topk_in_groups(bound_BL.view(torch.int16), n_candidates)
    return latent_idx_BC, rounded_up(bits_BC.amin(1).view(torch.bfloat16))


def _exact_values(encoder: Encoder, latent_idx_BC: Tensor) -> Tensor:
    x_BI, W_enc_LI, b_enc_L = encoder
    latents = SparseLatents.from_topk(latent_idx_BC, x_BI.new_empty(latent_idx_BC.shape), W_enc_LI.shape[0])
    order = LatentOrder(*latent_order(latents.latent_idx_N, latents.n_latents))
    value_N = pair_dots(latents.entries(order), x_BI, W_enc_LI)
    if b_enc_L is not None:
        value_N += b_enc_L.index_select(0, latent_idx_BC.view(-1))
    return value_N.view(latent_idx_BC.shape)
