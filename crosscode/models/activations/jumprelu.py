"""JumpReLU with a learned threshold and a straight-through gradient (Anthropic, January 2025 update).

Axes: B tokens · I flattened input dims · L latents.
"""

from __future__ import annotations

from typing import Literal

import torch
from crosscode_kernels import OpSet
from crosscode_kernels.sparse import Latents
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from crosscode.config.registry import ConfigModel
from crosscode.models.activations.base import ACTIVATIONS, ActivationFunction

SMALLEST_THRESHOLD = 1e-6
"""Linear thresholds stay positive."""
LINEAR_TRAVEL = 3.0
"""Pre-activations of scaled activations, and so their thresholds, are of this size."""


@ACTIVATIONS.register
class AnthropicSTEJumpReLUActivation(ActivationFunction):
    """`h * 1[h > theta]`, a threshold per latent, of which either the log or itself is the parameter.

    Where `|h - theta| < bandwidth / 2` the threshold has the pseudo-derivative `-theta / bandwidth`, with respect to
    the log threshold (`ste = "anthropic"`) or to theta itself (`ste = "gdm"`, Rajamanoharan et al. 2024; always so where theta
    is the parameter). Adam moves its parameter by about its learning rate a step, whatever the gradient: so a log threshold
    moves by a share of theta, and one that was driven far off hardly comes back. A wanted L0 needs `thresholds = "linear"`.
    """

    class Config(ConfigModel):
        type: Literal["jumprelu"] = "jumprelu"
        thresholds: Literal["log", "linear"] = "log"
        """whether the log of a threshold is the parameter that is trained, or the threshold itself"""
        bandwidth: PositiveFloat = 2.0
        """width of the window around the threshold in which the threshold has a gradient"""
        log_threshold_init: float = Field(default=0.1, ge=-80, le=80)
        """log of the threshold at the start"""
        ste: Literal["anthropic", "gdm"] = "anthropic"
        """whether the pseudo-derivative is taken with respect to the log threshold or to the threshold"""
        input_gradient: bool = False
        """whether pre-activations within the window get a pseudo-derivative, too: theta / bandwidth"""

    title = "JumpReLU"
    may_be_either = True
    usual_terms = ("recon", "tanh", "pre_act")
    usual_init = "jan_update"
    capturable = True

    def setup(self) -> None:
        log_threshold_L = torch.full((self.n_latents,), self.log_threshold_init)
        if self.thresholds == "log":
            self.log_threshold_L = nn.Parameter(log_threshold_L)
            return
        self.threshold_L = nn.Parameter(log_threshold_L.exp())
        self.ste, self.threshold_travel = "gdm", LINEAR_TRAVEL

    def encode(
        self, ops: OpSet, x_BI: Tensor, W_enc_LI: Tensor, b_enc_L: Tensor | None, n_L: Tensor | None = None
    ) -> Latents:
        return ops.encode_jumprelu(
            x_BI, W_enc_LI, b_enc_L, self.log_thresholds_L(), self.bandwidth, self.ste,
            input_gradient=self.input_gradient,
        )  # fmt: skip

    def forward(self, preacts_BL: Tensor) -> Tensor:
        return preacts_BL * (preacts_BL > self.log_thresholds_L().exp())

    @torch.no_grad()
    def before_step(self, step: int, n_steps: int) -> None:
        if self.thresholds == "linear":  # a step may have taken it below, where it has no gradient
            self.threshold_L.clamp_(min=SMALLEST_THRESHOLD)

    def log_thresholds_L(self) -> Tensor:
        return (
            self.log_threshold_L if self.thresholds == "log" else self.threshold_L.clamp(min=SMALLEST_THRESHOLD).log()
        )

    def step_bandwidth(self) -> float | None:
        return self.bandwidth if self.thresholds == "linear" else None

    @torch.no_grad()
    def set_thresholds_(self, threshold_L: Tensor) -> None:
        if self.thresholds == "log":
            self.log_threshold_L.copy_(threshold_L.log())
        else:
            self.threshold_L.copy_(threshold_L)

    @torch.no_grad()
    def cutoffs_L(self, n_L: Tensor | None = None) -> Tensor:
        return self.log_thresholds_L().exp()

    def for_prefix(self, n_latents: int, threshold: Tensor | None) -> AnthropicSTEJumpReLUActivation:
        fresh = self.for_n_latents(n_latents)
        fresh.load_state_dict({name: value_L[:n_latents] for name, value_L in self.state_dict().items()})
        return fresh

    def set_cutoffs_(self, theta: Tensor) -> None:
        self.set_thresholds_(theta.clamp(min=torch.finfo(torch.float32).tiny))

    @torch.no_grad()
    def rescale_latents_(self, scale_L: Tensor) -> None:
        if self.thresholds == "log":
            self.log_threshold_L.add_(scale_L.log())
        else:
            self.threshold_L.clamp_(min=SMALLEST_THRESHOLD).mul_(scale_L)
