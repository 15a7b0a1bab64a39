"""BatchTopK: the k * B largest of a whole batch (Bussmann et al. 2024, arXiv:2412.06410).

Axes: B tokens · I flattened input dims · L latents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from crosscode_kernels import OpSet
from crosscode_kernels.sparse import Latents
from pydantic import Field, NonNegativeInt
from torch import Tensor

from crosscode.errors import InputError
from crosscode.models.activations.base import ACTIVATIONS, NEVER, Selection
from crosscode.models.activations.topk import AnnealedK, AnnealedKConfig, topk_mask_BL


def _just_below(theta: Tensor) -> Tensor:
    """What is at least `theta` is above this."""
    return torch.nextafter(theta, torch.zeros_like(theta))


THRESHOLD_SLACK = 1e-5
"""A value this close below the inference threshold, as a share of it, still reaches it: on the batch that set the
threshold one value equals it, and must not be lost to the rounding of another batch size."""


@dataclass(frozen=True)
class Cut:
    """What a part of a batch keeps of what the whole selects: what is above `threshold`, and of what equals it the values at
    places before `end`, counted through the part as `token * stride + latent`."""

    threshold: Tensor
    end: Tensor
    stride: int

    def without_later_ties(self, latents: Latents, scale_L: Tensor | None) -> Latents:
        """Of all that reaches the threshold, what is kept; the rest is 0, and gets no gradient."""
        rank = latents.value.detach()
        if scale_L is not None:
            rank = rank * latents.of_entries(scale_L)
        kept = (rank != self.threshold) | (latents.places(self.stride) < self.end)
        return latents.with_value(latents.value * kept)


@ACTIVATIONS.register
class BatchTopkActivation(AnnealedK):
    """In train mode the `k * B` largest of the batch; in eval mode all above a threshold, so that the result for one
    token does not depend on the others. In training that is a running mean of the smallest positive kept value; a saved
    model has the one that lets through k latents a token on the last activations trained on (`settle_threshold_`).

    For a batch that is processed in parts, `batch_cuts_set` gives where the selection of the whole batch ends, by `k_factor`.
    Then train mode keeps the same latents of the part.
    """

    class Config(AnnealedKConfig):
        type: Literal["batch_topk"] = "batch_topk"
        rank_by: Literal["activation", "decoder_norm_weighted"] = "activation"
        """what is ranked: the latent, or the latent times its decoder norm (the unscaled latent is kept)"""
        threshold_ema_decay: float = Field(default=0.999, ge=0, lt=1)
        """decay of the running mean that becomes the inference threshold"""
        threshold_start_step: NonNegativeInt = 0
        """training step from which the threshold is tracked"""

    title = "BatchTopK"
    usual_terms = ("recon", "auxk")
    selects_over_batch, capturable = True, True
    threshold: Tensor
    """of eval mode, a scalar"""
    n_steps: Tensor
    """steps over which it was tracked, a scalar"""
    mean_weight: Tensor
    """what the steps so far weigh in it, a scalar"""
    _one: Tensor

    def setup(self) -> None:
        super().setup()
        self.uses_decoder_norms = self.rank_by == "decoder_norm_weighted"
        self._batch_cuts: Mapping[int, Cut] = {}
        # Statistics stay float32 whatever the parameters are; -1 says that nothing was tracked yet.
        self.register_buffer("threshold", torch.tensor(-1.0, dtype=torch.float32))
        self.register_buffer("n_steps", torch.tensor(0, dtype=torch.int64))
        # Sum of the weights of what went into the running mean: dividing by it takes away the bias of the start.
        self.register_buffer("mean_weight", torch.tensor(0.0, dtype=torch.float32), persistent=False)
        self.register_buffer("_one", torch.tensor(1.0, dtype=torch.float32), persistent=False)

    def encode(
        self, ops: OpSet, x_BI: Tensor, W_enc_LI: Tensor, b_enc_L: Tensor | None, n_L: Tensor | None = None
    ) -> Latents:
        scale_L = self._rank_scale(n_L)
        if self.training and self.k_factor in self._batch_cuts:
            cut = self._batch_cuts[self.k_factor]
            reaching = ops.encode_threshold(x_BI, W_enc_LI, b_enc_L, cut.threshold, scale_L)
            return cut.without_later_ties(reaching, scale_L)
        if self.training:
            return ops.encode_batch_topk(x_BI, W_enc_LI, b_enc_L, self.current_k, scale_L)
        return ops.encode_threshold(x_BI, W_enc_LI, b_enc_L, self._inference_threshold(), scale_L)

    def forward(self, preacts_BL: Tensor, n_L: Tensor | None = None) -> Tensor:
        a_BL = preacts_BL.relu()
        scale_L = self._rank_scale(n_L)
        rank_BL = a_BL if scale_L is None else a_BL * scale_L
        if self.training:
            keep_BL = topk_mask_BL(rank_BL.reshape(1, -1), self.current_k * a_BL.shape[0]).reshape(a_BL.shape)
        else:
            keep_BL = rank_BL >= self._inference_threshold()
        return torch.where(keep_BL, a_BL, torch.zeros_like(a_BL))

    @torch.no_grad()
    def after_step(self, latents: Latents, n_L: Tensor | None = None) -> None:
        rank = self.ranks(latents, n_L)
        self._update_threshold(latents.smallest_positive(rank).to(self.threshold.dtype))
        self.n_steps.add_(1)

    def ranks(self, latents: Latents, n_L: Tensor | None = None) -> Tensor:
        scale_L = self._rank_scale(n_L)
        return latents.value if scale_L is None else latents.value * latents.of_entries(scale_L)

    def _update_threshold(self, smallest: Tensor) -> None:
        """Device-side only, for a step must not wait for a value, and in few ops. `smallest`: inf where there is none."""
        tracked = smallest < math.inf
        if self.threshold_start_step:
            tracked &= self.n_steps >= self.threshold_start_step
        share = tracked * (1 - self.threshold_ema_decay)
        self.mean_weight.lerp_(self._one, share)
        mean = torch.lerp(self.threshold, smallest, share / self.mean_weight)
        torch.where(tracked, mean, self.threshold, out=self.threshold)

    def check_evaluated_at(self, step: int) -> None:
        if self.threshold_start_step >= step:
            raise InputError(
                f"{self.section}.threshold_start_step = {self.threshold_start_step}: must be below the step of the "
                f"first evaluation, {step} (evaluation.every, or the end of training)"
            )

    def selection(self) -> Selection | None:
        # A threshold needs no ranking.
        return super().selection() if self.training and not self._batch_cuts else None

    @contextmanager
    def batch_cuts_set(self, cut_of_factor: Mapping[int, Cut]) -> Iterator[None]:
        self._batch_cuts = cut_of_factor
        try:
            yield
        finally:
            self._batch_cuts = {}

    @torch.no_grad()
    def settle_threshold_(self, threshold: Tensor) -> None:
        self.threshold.copy_(threshold)

    @torch.no_grad()
    def cutoffs_L(self, n_L: Tensor | None = None) -> Tensor:
        scale_L, theta = self._rank_scale(n_L), self._inference_threshold()
        if scale_L is None or bool(theta == 0):
            return _just_below(theta).expand(self.n_latents).clone()
        return torch.where(scale_L > 0, _just_below(theta / scale_L), NEVER)

    @torch.no_grad()
    def ranked_cutoff(self) -> Tensor:
        return _just_below(self._inference_threshold())

    def for_prefix(self, n_latents: int, threshold: Tensor | None) -> BatchTopkActivation:
        self._inference_threshold()
        fields = {"k": min(self.k, n_latents), "k_start": None}
        alone = self.of(self.config.model_copy(update=fields), n_latents=n_latents)
        alone.load_state_dict(self.state_dict())
        if threshold is not None:  # that of the whole keeps of the first latents what eval mode keeps of them
            alone.settle_threshold_(threshold)
        return alone

    def set_cutoffs_(self, theta: Tensor) -> None:
        above = torch.nextafter(theta.float().clamp(min=0), torch.tensor(float("inf")))
        self.settle_threshold_(above / (1 - THRESHOLD_SLACK))

    def running_statistics(self) -> tuple[Tensor, ...]:
        return self.threshold, self.mean_weight

    def tracked_threshold(self) -> Tensor | None:
        return self.threshold if float(self.threshold) > 0 else None

    def rescale_latents_(self, scale_L: Tensor) -> None:
        # `a * n` is what it was, so the ranking and its threshold hold; a ranking by `a` alone would change.
        if not self.uses_decoder_norms:
            super().rescale_latents_(scale_L)

    def _rank_scale(self, n_L: Tensor | None) -> Tensor | None:
        if not self.uses_decoder_norms:
            return None
        if n_L is None:
            raise ValueError("BatchTopkActivation(rank_by='decoder_norm_weighted') needs the decoder norms n_L")
        return n_L.detach()

    def _inference_threshold(self) -> Tensor:
        if not self.threshold.is_meta and bool(self.threshold < 0):
            raise InputError(
                "BatchTopkActivation has no inference threshold yet: it is tracked during training; "
                "use model.train() or load a trained checkpoint"
            )
        return self.threshold * (1 - THRESHOLD_SLACK)
