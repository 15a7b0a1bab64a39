"""Nested dictionaries: every prefix must reconstruct alone (Bussmann et al. 2025, arXiv:2503.17547).

Axes: B tokens · S prefixes · Xo output crosscoding dims · Do output width.
"""

from __future__ import annotations

import math
import random
from typing import Any, Literal

from pydantic import PositiveInt
from torch import Tensor

from crosscode.config.registry import ConfigModel
from crosscode.errors import InputError
from crosscode.models.base import BaseCrosscoder
from crosscode.objectives.base import TERMS, LossContext, LossTerm
from crosscode.objectives.schedules import Weight
from crosscode.seeds import derived_seed


@TERMS.register
class MatryoshkaTerm(LossTerm):
    """The reconstruction errors of the prefixes of `crosscoder.prefixes`, added up; the whole dictionary's is `recon`. Latents
    are selected once, over the whole; a prefix decodes those of them that it holds, with the bias.
    """

    class Config(ConfigModel):
        type: Literal["matryoshka"] = "matryoshka"
        weight: Weight = 1.0
        """coefficient: a number or a schedule"""
        sampled: PositiveInt | None = None
        """draw so many prefixes anew at each step, of sizes from the smallest prefix to the whole, uniform in the logarithm;
        null: train those that are named"""
        seed: int = 0
        """seed of those draws"""
        normalise: bool = False
        """divide by the target's variance over the batch, as `recon.normalise` does"""

    capturable = True

    def setup(self) -> None:
        self.needs_whole_batch = self.normalise
        self._n_steps = 0
        if self.sampled is not None:
            self.capturable = False

    def check_model(self, model: BaseCrosscoder) -> None:
        if not model.prefixes:
            raise InputError(f"{self.section}: needs crosscoder.prefixes, such as [0.0625, 0.125, 0.25, 0.5]")

    def __call__(self, context: LossContext) -> Tensor:
        model, result = context.model, context.result
        y_BSXoDo = model.decode_prefixes(result.latents_of_parts, context.input_BXiDi, self.sizes(model))
        error_BSXoDo = y_BSXoDo - context.target_BXoDo[:, None]
        loss = error_BSXoDo.square().sum() / max(error_BSXoDo.shape[0], 1)
        return context.per_target_variance(loss) if self.normalise else loss

    def sizes(self, model: BaseCrosscoder) -> tuple[int, ...]:
        """Of the prefixes of this step, ascending."""
        if self.sampled is None:
            return model.prefixes
        draw, n_parts = random.Random(derived_seed(self.seed, self._n_steps)), len(model.parts)
        low, high = math.log(model.prefixes[0]), math.log(model.n_latents)
        drawn = (n_parts * round(math.exp(draw.uniform(low, high)) / n_parts) for _ in range(self.sampled))
        return tuple(sorted({min(size, model.n_latents - n_parts) for size in drawn}))

    # The sizes are those of a step, whichever part of its batch is at hand, and again after a resume.

    def after_step(self, l0: Tensor, step: int, n_steps: int) -> None:
        self._n_steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {} if self.sampled is None else {"n_steps": self._n_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._n_steps = state["n_steps"]
