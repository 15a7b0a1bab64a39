"""AuxK: dead latents learn to predict the error (Gao et al. 2024, arXiv:2406.04093, appendix A.2).

Axes: B tokens · O flattened output · L latents.
"""

from __future__ import annotations

from typing import Literal

import torch
from crosscode_kernels import encoder
from pydantic import PositiveInt
from torch import Tensor

from crosscode.config.registry import ConfigModel
from crosscode.objectives.base import TERMS, LossContext, LossTerm, batch_variance
from crosscode.objectives.schedules import Weight


@TERMS.register
class AuxKTerm(LossTerm):
    """Error of the `k_aux` largest dead latents, decoded without bias, against the detached reconstruction error;
    normalised by the error's variance over the batch and scaled by `min(n_dead, k_aux) / k_aux`.

    So it lies between 0 and about 1, while `recon` is a sum over the width (about `D` times the FVU of scaled activations):
    AuxK then weighs the less, the wider the output. Gao et al. normalise both terms: `recon.normalise: true`.
    """

    class Config(ConfigModel):
        type: Literal["auxk"] = "auxk"
        weight: Weight = 1 / 32
        """coefficient: a number or a schedule"""
        k_aux: PositiveInt = 256
        """dead latents used for each token; at most n_latents"""
        dead_after_tokens: PositiveInt | None = None
        """a latent is dead when it has not been active for this many tokens; null: train.dead_after_tokens"""

    needs_whole_batch, capturable = True, True

    def form(self, longest_silence: int | None, dead_after_tokens: int) -> bool:
        """Whether a latent may be dead."""
        return longest_silence is None or longest_silence >= (self.dead_after_tokens or dead_after_tokens)

    def __call__(self, context: LossContext) -> Tensor:
        dead_after = self.dead_after_tokens or context.dead_after_tokens
        dead_mask_L = context.tokens_since_fired_L >= dead_after
        may_be_dead = self.form(context.longest_silence, dead_after)
        if not may_be_dead or (encoder.may_look(dead_mask_L) and not dead_mask_L.any(0, keepdim=True).tolist()[0]):
            return context.recon.loss.new_zeros(())  # nothing is dead: no pass, nothing kept for backward
        k_aux = min(self.k_aux, context.model.n_latents)
        variance, residual_BO = context.whole.error_variance, context.recon.residual_BO
        unexplained = context.model.dead_recon_loss(context.input_BXiDi, dead_mask_L, k_aux, residual_BO)
        if variance is None:
            variance = batch_variance(residual_BO)
        # A batch without variance has nothing to explain: its term is 0, and so is the gradient (0/0 would be NaN).
        has_variance = variance > 0
        divisor = torch.where(has_variance, variance, torch.ones_like(variance))
        share_dead = dead_mask_L.sum().clamp(max=k_aux).to(unexplained.dtype) / k_aux
        return unexplained / divisor * share_dead * has_variance
