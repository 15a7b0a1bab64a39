"""Held-out figures of nested dictionaries.

Axes: B tokens · S prefixes · Xo output crosscoding dims · Do width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from crosscode.evaluation.fvu import FvuAccumulator
from crosscode.evaluation.raw_model import RawModel
from crosscode.models.base import BaseCrosscoder, ForwardResult


@dataclass(frozen=True)
class PrefixFigures:
    """What the first `n_latents` reconstruct alone, with those of the selected latents that they hold."""

    n_latents: int
    """latents of the prefix"""
    fvu: float
    """fraction of variance unexplained, over all positions"""
    l0: float
    """mean number of its latents that are active"""


class PrefixSums:
    """Sums over a held-out set, for each of the model's `prefixes`."""

    def __init__(self, model: BaseCrosscoder):
        self.sizes = model.prefixes
        self.fvus = [FvuAccumulator(model.out_dims) for _ in self.sizes]
        self.n_active: list[Tensor | int] = [0] * len(self.sizes)

    def add(self, raw_model: RawModel, result: ForwardResult, raw_target_BXoDo: Tensor) -> None:
        if not self.sizes:
            return
        model = raw_model.model
        y_BSXoDo = model.decode_prefixes(result.latents_of_parts, result.input_BXiDi, self.sizes)
        counts = [latents.firing_counts_L() for latents in result.latents_of_parts]
        for s, size in enumerate(self.sizes):
            self.fvus[s].update(raw_target_BXoDo, raw_model.raw(y_BSXoDo[:, s]))
            for counts_L in counts:
                self.n_active[s] = counts_L[: size // len(model.parts)].sum() + self.n_active[s]

    def result(self, n_tokens: int) -> list[PrefixFigures]:
        """Waits for the device."""
        zipped = zip(self.sizes, self.fvus, self.n_active, strict=True)
        return [PrefixFigures(size, fvu.fvu(), float(n_active) / n_tokens) for size, fvu, n_active in zipped]
