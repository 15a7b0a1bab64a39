"""The bootstrap over sequences: tokens of one sequence depend on each other, sequences hardly do.

Q all sequences · F figures · R resamples.
"""

from __future__ import annotations

import torch
from torch import Tensor

N_RESAMPLES = 1000


def resampled_means(n_Q: Tensor, sums_QF: Tensor) -> Tensor:
    """`means_RF` over as many sequences, drawn with replacement, always the same draws.

    Args:
        n_Q: predictions of each sequence, float64.
        sums_QF: sums of figures over them, float64.
    """
    generator = torch.Generator().manual_seed(0)
    drawn_RQ = torch.randint(n_Q.shape[0], (N_RESAMPLES, n_Q.shape[0]), generator=generator)
    ones_RQ = torch.ones_like(drawn_RQ, dtype=torch.float64)
    times_RQ = torch.zeros_like(ones_RQ).scatter_add(1, drawn_RQ, ones_RQ)
    return (times_RQ @ sums_QF) / (times_RQ @ n_Q)[:, None]


def interval_95(values_R: Tensor) -> list[float]:
    """Percentiles."""
    return values_R.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
