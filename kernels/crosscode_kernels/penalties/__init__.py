"""Kernels of the decoder-norm weighted penalties `weighted_l1` (c is None) and `weighted_tanh`, and what `pre_act` takes.

Axes: L latents.
"""

from typing import NamedTuple

from torch import Tensor


class PreActTerm(NamedTuple):
    """Log thresholds, decoder norms and the coefficient of each latent."""

    t_L: Tensor
    n_L: Tensor
    lambda_L: Tensor
