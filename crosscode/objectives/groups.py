"""Coefficients per latent: shared and exclusive latents of model diffing (Anthropic, February 2025 update).

Axes: L latents.
"""

from __future__ import annotations

import logging

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from crosscode.config.registry import ConfigModel
from crosscode.errors import InputError
from crosscode.models.base import BaseCrosscoder
from crosscode.objectives.base import LossContext

LARGEST_USUAL_RATIO = 0.3
_logger = logging.getLogger("crosscode")


class SharedRatioConfig(ConfigModel):
    """Config of a penalty that may be weaker on shared latents."""

    shared_ratio: NonNegativeFloat | None = None
    """lambda_s / lambda_f: by what the coefficient is multiplied for the shared latents (0.1 to 0.2 is usual); only
    for models with shared latents; None: 1"""


def check_shared_ratio(term: str, model: BaseCrosscoder, shared_ratio: float | None) -> None:
    """Raise `InputError` for a ratio without shared latents; warn where it is so large that sharing does not pay."""
    if not model.n_shared_latents:
        if shared_ratio is not None:
            raise InputError(
                f"objective.{term}.shared_ratio = {shared_ratio}: the model has no shared latents "
                "(n_shared_latents = 0); leave it out"
            )
        return
    ratio = 1.0 if shared_ratio is None else shared_ratio
    if ratio > LARGEST_USUAL_RATIO:
        _logger.warning(
            "objective.%s.shared_ratio = %s: lambda_s / lambda_f above %s; shared latents then hardly pay for models "
            "and exclusive latents take over shared features (0.1 to 0.2 is usual)",
            term,
            ratio,
            LARGEST_USUAL_RATIO,
        )


def penalty_norms_L(context: LossContext) -> Tensor:
    """`n_L`, in which the one vector of a shared latent counts once, not once for each model that has it."""
    model, n_L = context.model, context.decoder_norms.n_L
    n_shared = model.n_shared_latents
    if not n_shared:
        return n_L
    n_copies = model.out_dims[0]
    share = 1 / n_copies if model.decoder_norm == "sum" else n_copies**-0.5
    return torch.cat([n_L[:n_shared] * share, n_L[n_shared:]])


def lambda_L(context: LossContext, shared_ratio: float | None) -> Tensor:
    """`ratio` for shared latents, 1 for the others; the schedule's coefficient multiplies both."""
    n_L = context.decoder_norms.n_L
    ones_L = torch.ones(context.model.n_latents, dtype=n_L.dtype, device=n_L.device)
    if shared_ratio is not None:
        ones_L[: context.model.n_shared_latents] = shared_ratio
    return ones_L
