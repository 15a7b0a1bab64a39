"""Every kernel at a real size, and every launch that the Triton backend makes for it: the ground of the static checks.

Axes: B tokens · I flattened input dims · O flattened output dims · L latents · X crosscoding positions
N stored entries · k entries per token.

Ops are called with tensors on the `meta` device while launches are recorded, so that the launches are exactly those of
a training step of that size, without its memory and without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from crosscode_kernels.capacity.triton_impl import product_if, support
from crosscode_kernels.encode_threshold.triton_impl import kept_counts, kept_entries
from crosscode_kernels.encoder import Encoder
from crosscode_kernels.fused_adam.triton_impl import norm_of_rows, update_rows
from crosscode_kernels.penalties import PreActTerm
from crosscode_kernels.penalties.deferred import PenaltyTerm
from crosscode_kernels.registration import kernel_of
from crosscode_kernels.segments.deferred import SegmentGrad
from crosscode_kernels.sparse import Entries
from crosscode_kernels.triton_common.launch import Launch, recorded_launches
from static_tensors import N_PREFIXES, Case, Tensors
from torch import Tensor


def _threshold_select(case: Case, t: Tensors, scale_L: Tensor | None) -> tuple[Tensor, ...]:
    count_B = kept_counts(t.h_BL, t.g, scale_L)
    n_kept = case.n_tokens * case.k if count_B.is_meta else int(count_B.sum())
    return count_B, *kept_entries(t.h_BL, t.g, scale_L, count_B, n_kept)


def _capacity_support(t: Tensors, least_L: Tensor | None) -> tuple[Tensor, ...]:
    """Room for 0.5 % of all, and in a small batch for all."""
    n = t.h_BL.numel()
    return support(t.h_BL, t.h_BL, least_L, min(n, max(n // 200, 8192)))


def _capacity_product(t: Tensors, backend: str, kind: str) -> Tensor:
    mask = bias = None
    if kind == "decode":
        left, right, bias = t.h_BL, t.W_dec_LO, t.b_dec_O
    elif kind == "values":
        left, right = t.y_BO, t.W_dec_LO.T
    else:
        left, right, mask = t.da_BL.T, t.x_BI, t.h_BL
    if backend == "torch":
        left = left if mask is None else left.masked_fill(mask.T <= 0, 0)
        product = left.float() @ right.float()
        return (product if bias is None else product + bias.float()).to(left.dtype)
    out = left.new_empty(left.shape[0], right.shape[1])
    product_if(torch.ones((), dtype=torch.int32, device=out.device), left, right, out, mask=mask, bias=bias)
    return out


def _windows(case: Case) -> tuple[list[int], int]:
    """As of source layers: the first dictionary writes to all positions, each further one to those from its own on."""
    return list(accumulate(case.segments, initial=0))[:-1], case.output_width


def _grouped(case: Case, t: Tensors) -> tuple[Entries, list[int], list[Tensor]]:
    """The batch once for each output position; the weights lie one behind the other."""
    firsts, n_out = _windows(case)
    W_S = [part.view(case.n_latents, -1) for part in t.W_groups.split([case.n_latents * (n_out - at) for at in firsts])]
    entries = Entries(*(torch.cat([field] * len(firsts)) for field in t.entries))
    return entries, [t.value_N.shape[0]] * len(firsts), W_S


def _jumprelu_backward(t: Tensors, term: PenaltyTerm, backend: str) -> tuple[Tensor, ...]:
    da_BL = t.da_BL
    if backend == "torch" and term.g is not None:  # which is handed ordinary gradients alone
        a_BL = kernel_of("jumprelu", "torch")(t.h_BL, t.t_L).float().requires_grad_()
        weighted_BL = a_BL * term.n_L
        if term.c is not None:
            weighted_BL = (term.c * weighted_BL).tanh()
        (term.g * (weighted_BL * term.lambda_L).sum() / a_BL.shape[0]).backward()
        assert a_BL.grad is not None
        da_BL, term = a_BL.grad + da_BL, PenaltyTerm()
    return kernel_of("encode_jumprelu_backward", backend)(da_BL, t.lambda_L, t.h_BL, t.t_L, 2.0, False, term)


ADAM_STEP = 7
"""What the optimizer's step is; every third row was brought up to date at step 4."""


def fused_adam(t: Tensors, backend: str, kind: str = "") -> tuple[Tensor, ...]:
    """A step over the encoder with the gradient of main latents (and, without `kind`, another of dead ones), and the norm before
    it."""
    weight, beta1, beta2 = t.W_enc_LI.float(), 0.0 if kind == "row-sparse" else 0.9, 0.999
    moments = torch.bfloat16 if kind == "bfloat16" else torch.float32
    param, mean, square = weight.clone(), weight.to(moments, copy=True), (weight * weight).to(moments)
    last_L = torch.full((weight.shape[0],), ADAM_STEP - 1, dtype=torch.int32, device=weight.device)
    last_L[::3] = 4
    if backend == "torch":
        entries = t.entries._replace(value_N=t.value_N.float())
        grad_LI = kernel_of("segment_rows", "torch")(entries, t.x_BI.float())[0]
        touched_L = t.order[1].diff() > 0 if kind == "row-sparse" else torch.ones_like(last_L, dtype=torch.bool)
        decay_L1 = beta2 ** (ADAM_STEP - 1 - last_L).float()[:, None] if kind == "row-sparse" else 1.0
        after = [mean.float().lerp(grad_LI, 1 - beta1), beta2 * decay_L1 * square.float() + (1 - beta2) * grad_LI**2]
        moved = param - 0.5 * after[0] / (after[1].sqrt() / 0.5 + 1e-8)
        if kind == "bfloat16":
            noise_LI = _noise(weight.numel(), weight.device).view(weight.shape)
            after = [_by_chance(one, noise_LI >> shift) for one, shift in zip(after, (0, 16), strict=True)]
        found = [
            torch.where(touched_L[:, None], *pair)
            for pair in ((moved, param), *zip(after, (mean, square), strict=True))
        ]
        last_L = torch.where(touched_L, ADAM_STEP, last_L)
        own = [found[0], found[2], last_L] if kind == "row-sparse" else found
        return (grad_LI if kind else 2 * grad_LI).norm(), *own, found[0].to(t.W_enc_LI.dtype)
    grad = SegmentGrad.of(t.entries, t.x_BI)
    grad = grad if kind else grad + SegmentGrad.of(t.entries, t.x_BI)
    number_5 = torch.full((5,), 0.5, device=weight.device)
    number_5[2] = 1.0 if kind else 0.5
    number_5[4] = ADAM_STEP
    copy, norm = weight.to(t.W_enc_LI.dtype, copy=True), norm_of_rows(grad)
    kept = (None, square, last_L) if kind == "row-sparse" else (mean, square, None)
    update_rows(param, grad, *kept, copy, number_5, (beta1, beta2), 1e-8)
    return norm, param, *(one for one in kept if one is not None), copy


def _noise(n: int, device: torch.device) -> Tensor:
    """What bfloat16 moments are rounded by."""
    low = 0xFFFFFFFF
    bits = (torch.arange(n, device=device) * 0x9E3779B1 + ADAM_STEP * 0x85EBCA77) & low
    bits = ((bits ^ (bits >> 16)) * 0x7FEB352D) & low
    bits = ((bits ^ (bits >> 15)) * 0x846CA68B) & low
    return bits ^ (bits >> 16)


def _by_chance(value: Tensor, noise: Tensor) -> Tensor:
    bits = (value.view(torch.int32).long() + (noise & 0xFFFF)) & 0xFFFF0000
    return bits.int().view(torch.float32).bfloat16()


def op_calls(case: Case, t: Tensors, backend: str = "triton") -> dict[str, Callable[[], Any]]:
    """Every kernel of "triton" by its registered name (with a suffix where it has variants), ready to call; or what "torch"
    has under that name (for encode_threshold and capacity_support always the former)."""
    c = case
    k_aux = min(max(c.input_width // 2, 1), 512, c.n_latents)
    encoder = Encoder(t.x_BI, t.W_enc_LI, t.b_enc_L)
    entries = t.entries
    joined, counts, W_S = _grouped(c, t)
    penalty = (t.n_L, t.lambda_L)
    term = PreActTerm(t.t_L, t.n_L, t.lambda_L)

    def call(op: str, *args: Any, option: str = "") -> Callable[[], Any]:
        return lambda: kernel_of(op, backend, option)(*args)

    calls = {
        "encode_topk": call("encode_topk", encoder, c.k),
        "encode_topk screened": call("encode_topk", encoder, c.k, option="screened"),
        "encode_batch_topk": call("encode_batch_topk", encoder, c.k, None),
        "encode_batch_topk scaled": call("encode_batch_topk", encoder, c.k, t.n_L),
        "aux_topk": call("aux_topk", encoder, t.dead_L, k_aux),
        "aux_topk unbiased": call("aux_topk", encoder._replace(b_enc_L=None), t.dead_L, k_aux),
        "sparse_decode": call("sparse_decode", entries, t.W_dec_LO, t.b_dec_O),
        "sparse_decode unbiased": call("sparse_decode", entries, t.W_enc_LI, None),
        "decode_recon": call("decode_recon", entries, t.W_dec_LO, t.b_dec_O, t.target_BO, t.segments),
        "decode_recon unbiased": call("decode_recon", entries, t.W_dec_LO, None, t.target_BO, t.segments),
        "nested_decode": call("nested_decode", t.in_segments(entries), t.W_dec_LO, t.b_dec_O, N_PREFIXES),
        "nested_decode unbiased": call("nested_decode", t.in_segments(entries), t.W_dec_LO, None, N_PREFIXES),
        "grouped_decode": call("grouped_decode", joined, counts, W_S, t.b_dec_O, *_windows(c)),
        "grouped_decode unbiased": call("grouped_decode", joined, counts, W_S, None, *_windows(c)),
        "grouped_backward": call("grouped_backward", joined, counts, t.y_BO, W_S, *_windows(c)[:1], True),
        "gather_dot": call("gather_dot", entries._replace(order_N=entries.order_N[:0]), t.y_BO, t.W_dec_LO),
        "gather_dot by latent": call("gather_dot", entries, t.y_BO, t.W_dec_LO),
        "sparse_decode_backward": call("sparse_decode_backward", entries, t.y_BO, t.W_dec_LO),
        "fused_adam": lambda: fused_adam(t, backend),
        "fused_adam row-sparse": lambda: fused_adam(t, backend, "row-sparse"),
        "fused_adam bfloat16": lambda: fused_adam(t, backend, "bfloat16"),
        "encode_threshold": lambda: _threshold_select(case, t, None),
        "encode_threshold scaled": lambda: _threshold_select(case, t, t.n_L),
        "segment_rows": call("segment_rows", entries, t.x_BI),
        "decoder_norms": call("decoder_norms", t.W_dec_LO, t.segments, False),
        "recon_loss": call("recon_loss", t.y_BO, t.target_BO, t.segments),
        "recon_loss_backward": call("recon_loss_backward", t.g_X, t.y_BO, t.segments),
        "jumprelu": call("jumprelu", t.h_BL, t.t_L),
        "encode_jumprelu": call("encode_jumprelu", t.h_BL, t.t_L),
        "pre_act": call("pre_act", t.h_BL, term),
        "pre_act_backward": call("pre_act_backward", t.g, t.h_BL, term),
    }
    for joint in (False, True):
        calls[f"decoder_norms_backward {'joint' if joint else 'sum'}"] = call(
            "decoder_norms_backward", t.norms_LX, t.lambda_L, t.W_dec_LO, t.norms_LX, t.n_L, t.segments, joint
        )
    for kind, part in (
        ("plain", PenaltyTerm()),
        ("l1", PenaltyTerm(t.g, *penalty)),
        ("tanh", PenaltyTerm(t.g, *penalty, 4.0)),
    ):
        calls[f"encode_jumprelu_backward {kind}"] = lambda part=part: _jumprelu_backward(t, part, backend)
    for gdm in (False, True):
        suffix = "gdm" if gdm else "anthropic"
        calls[f"jumprelu_backward {suffix}"] = call("jumprelu_backward", t.da_BL, t.h_BL, t.t_L, 2.0, gdm)
    for kind, slope in (("l1", None), ("tanh", 4.0)):
        for form, latents in (("dense", t.h_BL), ("sparse", entries)):
            calls[f"{form}_penalty {kind}"] = call(f"{form}_penalty", latents, *penalty, slope)
            calls[f"{form}_penalty_backward {kind}"] = call(f"{form}_penalty_backward", t.g, latents, *penalty, slope)
    for kind in ("decode", "values", "weights"):
        calls[f"capacity_product {kind}"] = lambda kind=kind: _capacity_product(t, backend, kind)
    for kind, least_L in (("relu", None), ("jumprelu", t.t_L)):
        calls[f"capacity_support {kind}"] = lambda least_L=least_L: _capacity_support(t, least_L)
    if c.n_latents % c.k == 0:
        calls["encode_groupmax"] = call("encode_groupmax", encoder, c.k)
    return calls


def launches(case: Case, dtype: torch.dtype) -> dict[str, list[Launch]]:
    """The launches of each op of a case."""
    found: dict[str, list[Launch]] = {}
    for name, call in op_calls(case, Tensors(case, dtype)).items():
        with recorded_launches() as record:
            call()
        found[name] = list(record)
    return found
