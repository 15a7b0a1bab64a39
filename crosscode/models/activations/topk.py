"""TopK: the k largest positive pre-activations of each token (Gao et al. 2024, arXiv:2406.04093).

Axes: B tokens · I flattened input dims · L latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from crosscode_kernels import OpSet
from crosscode_kernels.sparse import Latents
from pydantic import Field, PositiveInt
from torch import Tensor

from crosscode.config.registry import ConfigModel
from crosscode.errors import InputError
from crosscode.models.activations.base import ACTIVATIONS, ActivationFunction, Selection


def topk_mask_BL(rank_BL: Tensor, k: int) -> Tensor:
    """The k largest entries of each row; ties go to the lowest index."""
    order_BL = torch.sort(rank_BL, dim=1, descending=True, stable=True).indices
    mask_BL = torch.zeros_like(rank_BL, dtype=torch.bool)
    return mask_BL.scatter(1, order_BL[:, :k], True)


class AnnealedKConfig(ConfigModel):
    """How many latents are kept, with an optional start at a larger number."""

    k: PositiveInt
    """latents kept for each token (BatchTopK: on average over the batch)"""
    k_start: PositiveInt | None = None
    """latents kept at step 0, from where the number falls linearly to k; None: k from the start"""
    k_anneal_fraction: float = Field(default=0.1, gt=0, le=1)
    """share of the run until k is reached"""


class AnnealedK(ActivationFunction):
    """An activation that keeps `k` latents; in train mode `k` may be annealed. Eval mode always keeps `k`."""

    is_sparse = True
    keeps_k = True

    def setup(self) -> None:
        most = self.selects_from or self.n_latents
        for name in ("k", "k_start"):
            value = getattr(self, name)
            if value is not None and value > most:
                raise InputError(f"{self.section}.{name} = {value}: must be between 1 and n_latents = {most}")
        if self.k_start is not None and self.k_start < self.k:
            raise InputError(f"{self.section}.k_start = {self.k_start}: must not be below k = {self.k}")
        self._annealed_k = self.k if self.k_start is None else self.k_start

    def before_step(self, step: int, n_steps: int) -> None:
        if self.k_start is not None:
            share = min(1.0, step / max(1.0, self.k_anneal_fraction * n_steps))
            self._annealed_k = round(self.k_start + (self.k - self.k_start) * share)

    @property
    def is_annealing(self) -> bool:
        return self._annealed_k != self.k

    @property
    def wanted_k(self) -> int:
        """The number to keep, however many latents there are to choose from."""
        return self.k_factor * (self._annealed_k if self.training else self.k)

    @property
    def current_k(self) -> int:
        """The k of this step: `k`, or more while it is annealed."""
        return min(self.wanted_k, self.n_latents)

    @property
    def most_kept(self) -> int:
        return self.k

    @contextmanager
    def annealing_over(self) -> Iterator[None]:
        before, self._annealed_k = self._annealed_k, self.k
        try:
            yield
        finally:
            self._annealed_k = before

    def for_prefix(self, n_latents: int, threshold: Tensor | None) -> ActivationFunction:
        if threshold is None:
            raise InputError(
                f"prefix: no threshold was calibrated for {n_latents} latents (of one source layer); name the size in "
                "crosscoder.prefixes and train"
            )
        alone = ACTIVATIONS.build({"type": "batch_topk", "k": min(self.k, n_latents)}, n_latents=n_latents)
        alone.settle_threshold_(threshold)
        return alone

    def selection(self) -> Selection | None:
        return Selection(self.wanted_k, self.selects_over_batch)


@ACTIVATIONS.register
class TopkActivation(AnnealedK):
    """ReLU, then the `k` largest of each token. A pre-activation <= 0 is never kept."""

    class Config(AnnealedKConfig):
        type: Literal["topk"] = "topk"

    title = "TopK"
    usual_terms = ("recon", "auxk")
    is_screened, capturable = True, True

    def encode(
        self, ops: OpSet, x_BI: Tensor, W_enc_LI: Tensor, b_enc_L: Tensor | None, n_L: Tensor | None = None
    ) -> Latents:
        return ops.encode_topk(x_BI, W_enc_LI, b_enc_L, self.current_k)

    def forward(self, preacts_BL: Tensor) -> Tensor:
        a_BL = preacts_BL.relu()
        return torch.where(topk_mask_BL(a_BL, self.current_k), a_BL, torch.zeros_like(a_BL))
