"""How well a dictionary recovers a planted one.

Axes: F planted features · L latents · M models · P hookpoints · D width · O = M, P and D flattened.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from crosscode.errors import InputError


@dataclass(frozen=True)
class Recovery:
    """Figures of one group of features."""

    n_features: int
    matched_cosine: float
    """mean |cosine| of features with the latents matched to them one to one (Hungarian)"""
    mean_max_cosine: float
    """mean over features of the largest |cosine| with any latent"""
    recovered: float
    """share of features whose matched |cosine| is at least 0.9"""


@dataclass(frozen=True)
class GroundTruth:
    """What a dictionary found. Precision and recall are NaN where there is nothing to tell apart."""

    all: Recovery
    shared: Recovery | None
    exclusive: Recovery | None
    precision: float
    """of the matched latents called exclusive to a model, the share whose feature is"""
    recall: float
    """of the features exclusive to a model, the share whose matched latent is called so"""


def cosines_FL(planted_FMPD: Tensor, decoder_LMPD: Tensor) -> Tensor:
    """|cosine| over all models and hookpoints together; 0 for a latent without decoder."""
    planted_FO, decoder_LO = planted_FMPD.flatten(1).double(), decoder_LMPD.flatten(1).double()
    planted_FO = planted_FO / planted_FO.norm(dim=1, keepdim=True)
    decoder_LO = decoder_LO / decoder_LO.norm(dim=1, keepdim=True).clamp(min=1e-30)
    return (planted_FO @ decoder_LO.T).abs()


def called_exclusive_L(decoder_LMPD: Tensor, threshold: float = 0.9) -> Tensor:
    """For each latent the model that has more than `threshold` of the sum of its decoder norms; -1: none has."""
    norms_LM = decoder_LMPD.double().norm(dim=-1).sum(-1)
    share_LM = norms_LM / norms_LM.sum(1, keepdim=True).clamp(min=1e-30)
    largest = share_LM.max(1)
    return torch.where(largest.values > threshold, largest.indices, -1)


def compare_with_planted(
    planted_FMPD: Tensor, model_F: Tensor, decoder_LMPD: Tensor, exclusive_threshold: float = 0.9
) -> GroundTruth:
    """Match latents to planted features and count.

    Args:
        planted_FMPD: directions of the planted features, raw space.
        model_F: the model to which a feature is exclusive; -1: none.
        decoder_LMPD: decoder vectors, raw space (scaling folded in).
        exclusive_threshold: relative decoder norm above which a latent is called exclusive to a model.
    """
    if planted_FMPD.shape[1:] != decoder_LMPD.shape[1:]:
        raise InputError(
            f"ground truth: planted features are {tuple(planted_FMPD.shape[1:])} (M, P, D), "
            f"decoder vectors {tuple(decoder_LMPD.shape[1:])}"
        )
    if decoder_LMPD.shape[0] < planted_FMPD.shape[0]:
        raise InputError(
            f"n_latents = {decoder_LMPD.shape[0]}: at least one for each of the {planted_FMPD.shape[0]} features"
        )
    cosine_FL = cosines_FL(planted_FMPD, decoder_LMPD)
    feature_F, latent_F = linear_sum_assignment(cosine_FL.numpy(), maximize=True)
    matched_F = cosine_FL[feature_F, latent_F]

    def recovery(select_F: Tensor) -> Recovery | None:
        if not bool(select_F.any()):
            return None
        return Recovery(
            n_features=int(select_F.sum()),
            matched_cosine=float(matched_F[select_F].mean()),
            mean_max_cosine=float(cosine_FL[select_F].max(1).values.mean()),
            recovered=float((matched_F[select_F] >= 0.9).double().mean()),
        )

    called_F = called_exclusive_L(decoder_LMPD, exclusive_threshold)[latent_F]
    right_F = (called_F == model_F) & (model_F >= 0)
    everything = recovery(torch.ones_like(model_F, dtype=torch.bool))
    assert everything is not None
    several_models = planted_FMPD.shape[1] > 1
    return GroundTruth(
        all=everything,
        shared=recovery(model_F < 0),
        exclusive=recovery(model_F >= 0),
        precision=_ratio(right_F, called_F >= 0) if several_models else float("nan"),
        recall=_ratio(right_F, model_F >= 0) if several_models else float("nan"),
    )


def _ratio(hits: Tensor, of: Tensor) -> float:
    total = int(of.sum())
    return int(hits.sum()) / total if total else float("nan")
