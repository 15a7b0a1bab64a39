"""Activation scaling per model and hookpoint.

B tokens · M models · P hookpoints · D model dimension.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from crosscode.errors import InputError


def estimate_scaling(acts_BMPD_stream: Iterable[torch.Tensor], n_tokens: int) -> torch.Tensor:
    """`scaling_MP = sqrt(D) / mean ||x||` over the first `n_tokens` activations of
    `acts_BMPD_stream`, which gives `acts_BMPD` batch by batch (float32, on the CPU).

    Scaled activations then have a mean norm of sqrt(D). Source: Anthropic, "Sparse Crosscoders" (October 2024).
    Raises InputError where the stream is empty, not finite, or zero at some model and hookpoint.
    """
    norm_sum_MP, n_seen, d_model = None, 0, 0
    for acts_BMPD in acts_BMPD_stream:
        used_BMPD = acts_BMPD[: n_tokens - n_seen]
        sum_MP = used_BMPD.float().norm(dim=-1).double().sum(dim=0).cpu()
        norm_sum_MP = sum_MP if norm_sum_MP is None else norm_sum_MP + sum_MP
        n_seen, d_model = n_seen + used_BMPD.shape[0], used_BMPD.shape[-1]
        if n_seen >= n_tokens:
            break
    if norm_sum_MP is None or n_seen == 0:
        raise InputError("activation scaling: the data holds no usable position")
    if not bool(torch.isfinite(norm_sum_MP).all()) or bool((norm_sum_MP == 0).any()):
        raise InputError(f"activation scaling: mean norms {(norm_sum_MP / n_seen).tolist()} should be finite and > 0")
    return (d_model**0.5 * n_seen / norm_sum_MP).float()
