"""Adam with warm-up and decay."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from crosscode_kernels.fused_adam import FusedAdam
from crosscode_kernels.row_sparse_adam import RowSparseAdam
from pydantic import Field, PositiveFloat, model_validator

from crosscode.config.registry import ConfigModel
from crosscode.errors import InputError
from crosscode.models.base import BaseCrosscoder
from crosscode.trainers.optimizers.base import OPTIMIZERS, OptimizerPlan, lr_groups, warmup_and_decay

Decay = Annotated[float, Field(ge=0, lt=1)]

THRESHOLD_BETA2 = 0.9
"""Of thresholds that travel, at most. The pull of a wanted L0 falls a hundredfold until the target is reached: with a memory of a
thousand steps, thresholds that went too far would come back at a tenth of their rate."""


@OPTIMIZERS.register
class Adam(OptimizerPlan):
    """Adam (Kingma & Ba 2015), fused where the device allows."""

    class Config(ConfigModel):
        type: Literal["adam"] = "adam"
        lr: PositiveFloat | None = None
        """peak learning rate; null: 2e-4 / sqrt(n_latents / 2**14) (Gao et al. 2024)"""
        betas: tuple[Decay, Decay] = (0.9, 0.999)
        """decay rates of the two moments"""
        eps: PositiveFloat = 1e-8
        """added to the root of the second moment"""
        schedule: Literal["warmup_and_decay", "constant"] = "warmup_and_decay"
        """constant: the peak learning rate at every step, whatever the two fractions say"""
        warmup_fraction: float = Field(default=0.05, ge=0, le=1)
        """share of the run over which the learning rate rises from 0"""
        decay_fraction: float = Field(default=0.2, ge=0, le=1)
        """share of the run, at its end, over which the learning rate falls to 0"""
        threshold_lr_factor: PositiveFloat | None = None
        """factor on the learning rate of activation parameters (JumpReLU thresholds); null: 1, and for linear thresholds at
        least what lets them travel by 3 within the run"""
        row_sparse: bool | Literal["auto"] = False
        """update only the rows of weights that a batch touches: the same numbers for a sparse activation, a third less
        memory, less time where few latents are touched; needs betas[0] = 0 and the torch backend, or triton with fused.
        auto: what is faster, tried out when a run begins, whose own config then says it"""
        fused: bool | Literal["auto"] = False
        """with the Triton backend, sum the gradients of weights where they are used: norm, update and 16-bit copies of the
        weights take one pass less each, and no such gradient lies in memory. auto: with that backend"""
        moments: Literal["float32", "bfloat16"] = "float32"
        """what both moments of weights are kept in; bfloat16: a third less of the optimizer's memory traffic, rounded up or
        down by chance (the same whenever a run is repeated); needs fused"""
        lr_on_device: bool = False
        """keep the learning rate in memory of the device, so that a loop of your own can capture its step as a CUDA graph;
        with row_sparse needs fused"""

        @model_validator(mode="after")
        def _kernels_alone_can(self) -> Adam.Config:
            if self.moments != "float32" and self.fused is not True:
                raise ValueError(
                    f"moments = {self.moments!r} needs fused = true, got fused = {str(self.fused).lower()}"
                )
            if self.lr_on_device and self.row_sparse and self.fused is not True:
                raise ValueError(
                    "lr_on_device = true with row_sparse needs fused = true: row-sparse updates of the torch "
                    "backend read the learning rate in every step"
                )
            return self

        @model_validator(mode="after")
        def _momentum_moves_every_row(self) -> Adam.Config:
            if self.row_sparse and self.betas[0] != 0:
                raise ValueError(
                    f"row_sparse needs betas[0] = 0, got betas = {list(self.betas)}: momentum moves rows that have no "
                    "gradient"
                )
            return self

    def setup(self) -> None:
        self.states_per_weight = (1 if self.row_sparse is True else 2) / (2 if self.moments == "bfloat16" else 1)

    def grads_per_weight(self, model: BaseCrosscoder) -> int:
        is_deferred = self.fused is True or "deferred" in model.backend.options
        return int(not (is_deferred and all(part.activation_fn.is_sparse for part in model.parts)))

    def build(self, model: BaseCrosscoder) -> torch.optim.Optimizer:
        lr = 2e-4 / math.sqrt(model.n_latents / 2**14) if self.lr is None else self.lr
        groups = lr_groups(model, lr, self.threshold_lr_factor)
        for group in groups:
            if group["travel"]:
                beta2 = min(self.betas[1], THRESHOLD_BETA2)
                group |= {"betas": (self.betas[0], beta2), "beta2": beta2}  # RowSparseAdam has no other beta
            if self.lr_on_device:
                group["lr"] = torch.tensor(group["lr"], device=model.device)
        if "deferred" in model.backend.options:
            kept = {"row_sparse": self.row_sparse is True, "moments": getattr(torch, self.moments)}
            return FusedAdam(groups, lr=lr, betas=self.betas, eps=self.eps, **kept)
        if self.row_sparse is True:
            if "rows" not in model.backend.options:
                raise InputError(
                    f"train.optimizer.row_sparse = True: the model's backend {str(model.backend)!r} gives gradients of "
                    "every row; make it with backend=Backend('torch', ('rows',))"
                )
            return RowSparseAdam(groups, lr=lr, beta2=self.betas[1], eps=self.eps)
        fused = all(param.device.type in ("cpu", "cuda", "mps") for param in model.parameters())
        capturable = fused and self.lr_on_device
        return torch.optim.Adam(groups, lr=lr, betas=self.betas, eps=self.eps, fused=fused, capturable=capturable)

    def can_be_captured(self, model: BaseCrosscoder) -> bool:
        return "deferred" in model.backend.options or self.row_sparse is not True

    def lr_factor(self, step: int, n_steps: int) -> float:
        if self.schedule == "constant":
            return 1.0
        return warmup_and_decay(step, n_steps, self.warmup_fraction, self.decay_fraction)
