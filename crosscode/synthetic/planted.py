"""Activations from a planted dictionary, so that what a model should find is known.

Axes: B tokens · F features · M models · P hookpoints · D width · G groups of correlated features.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from crosscode.data.scaling import estimate_scaling
from crosscode.errors import InputError
from crosscode.seeds import derived_seed
from crosscode.synthetic.config import PlantedConfig


class PlantedDictionary:
    """`acts = sum_f a_f direction_f + noise`, with sparse `a_f >= 0`.

    Rates follow a power law over a random order of the features. Amplitudes are uniform in [0.5, 1.5]. A feature that
    is exclusive to a model is zero in the others.
    """

    def __init__(self, config: PlantedConfig):
        self.config = config
        n_features, dims = config.n_features, (config.n_models, config.n_hookpoints)
        if config.n_exclusive > n_features:
            raise InputError(
                f"planted.n_exclusive = {config.n_exclusive}: must not exceed planted.n_features = {n_features}"
            )
        if config.n_exclusive and config.n_models < 2:
            raise InputError(
                f"planted.n_exclusive = {config.n_exclusive}: exclusive features need planted.n_models >= 2"
            )
        generator = torch.Generator().manual_seed(config.seed)
        self.model_F = torch.full((n_features,), -1)
        """the one model that has the feature; -1: all have it"""
        exclusive = torch.arange(n_features - config.n_exclusive, n_features)
        self.model_F[exclusive] = torch.arange(config.n_exclusive) % config.n_models
        n_directions = config.n_models if config.shared_directions == "independent" else 1
        directions = torch.randn(n_features, n_directions, config.n_hookpoints, config.d_model, generator=generator)
        directions = directions / directions.norm(dim=-1, keepdim=True)
        present_FM = (self.model_F[:, None] == -1) | (self.model_F[:, None] == torch.arange(config.n_models))
        self.directions_FMPD = directions.expand(n_features, *dims, config.d_model) * present_FM[:, :, None, None]
        ranks_F = torch.randperm(n_features, generator=generator) + 1.0
        self.rate_F = _scaled_rates(ranks_F**-config.zipf_exponent, config.mean_active)

    def sample(self, n_tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """`(acts_BMPD, amplitudes_BF)`."""
        config = self.config
        if config.correlation:
            n_groups = math.ceil(config.n_features / config.group_size)
            group_BG = torch.randn(n_tokens, n_groups, generator=generator)
            common_BF = group_BG.repeat_interleave(config.group_size, 1)[:, : config.n_features]
            own_BF = torch.randn(n_tokens, config.n_features, generator=generator)
            hidden_BF = math.sqrt(config.correlation) * common_BF + math.sqrt(1 - config.correlation) * own_BF
            uniform_BF = torch.special.ndtr(hidden_BF)
        else:
            uniform_BF = torch.rand(n_tokens, config.n_features, generator=generator)
        # Where it fires, the uniform number over the rate is uniform again: it gives the amplitude.
        amplitude_BF = torch.where(uniform_BF < self.rate_F, 0.5 + uniform_BF / self.rate_F, 0.0)
        acts_BMPD = (amplitude_BF @ self.directions_FMPD.flatten(1)).unflatten(1, self.directions_FMPD.shape[1:])
        return acts_BMPD + config.noise * torch.randn(acts_BMPD.shape, generator=generator), amplitude_BF


def _scaled_rates(weight_F: Tensor, mean_active: float) -> Tensor:
    """Rates in proportion to the weights, none above 1/2, that add up to `mean_active`."""
    if mean_active > 0.5 * len(weight_F):
        raise InputError(
            f"planted.mean_active = {mean_active}: at most half of the {len(weight_F)} features can fire at once"
        )
    rate_F = weight_F * (mean_active / weight_F.sum())
    for _ in range(100):  # what is cut off at 1/2 is spread over the others, until nothing is
        rate_F = rate_F.clamp(max=0.5)
        missing = mean_active - rate_F.sum()
        if missing < 1e-6:
            break
        free_F = rate_F < 0.5
        rate_F = torch.where(free_F, rate_F * (1 + missing / rate_F[free_F].sum()), rate_F)
    return rate_F


class SyntheticActivations:
    """An endless stream of scaled `acts_BMPD`, as `ActivationsDataloader` gives for language models."""

    def __init__(
        self,
        dictionary: PlantedDictionary,
        batch_size: int,
        *,
        seed: int = 0,
        scale: bool = True,
        device: str | torch.device = "cpu",
    ):
        self.dictionary, self.batch_size, self.seed, self.device = dictionary, batch_size, seed, device
        self._batch = 0
        config = dictionary.config
        self._scaling_MP = torch.ones(config.n_models, config.n_hookpoints)
        if scale:
            sample_BMPD, _ = dictionary.sample(8192, self._generator(-1))
            self._scaling_MP = estimate_scaling([sample_BMPD], 8192)

    @property
    def scaling_MP(self) -> Tensor:
        """`sqrt(D) / mean ||x||`, estimated on a sample apart."""
        return self._scaling_MP

    @property
    def dims(self) -> tuple[int, int, int]:
        """(M, P, D)."""
        config = self.dictionary.config
        return config.n_models, config.n_hookpoints, config.d_model

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            acts_BMPD, _ = self.dictionary.sample(self.batch_size, self._generator(self._batch))
            self._batch += 1
            yield (acts_BMPD * self._scaling_MP[..., None]).to(self.device)

    def _generator(self, batch: int) -> torch.Generator:
        # Every batch has a seed of its own, so a position in the stream is one number.
        return torch.Generator().manual_seed(derived_seed(self.seed + 1, batch))

    def state_dict(self) -> dict[str, Any]:
        return {"batch": self._batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._batch = state["batch"]

    def close(self) -> None:
        """Nothing is held open."""
        return None
