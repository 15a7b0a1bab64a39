"""Activations from a planted dictionary.

Axes: B tokens · F features · M models · P hookpoints · D width.
"""

from __future__ import annotations

import pytest
import torch

from crosscode.errors import InputError
from crosscode.synthetic.planted import PlantedConfig, PlantedDictionary, SyntheticActivations


def fired(dictionary, n_tokens=20_000, seed=1):
    acts_BMPD, amplitude_BF = dictionary.sample(n_tokens, torch.Generator().manual_seed(seed))
    return acts_BMPD, amplitude_BF


@pytest.mark.parametrize("correlation", [0.0, 0.8])
def test_features_fire_at_their_rates(correlation):
    dictionary = PlantedDictionary(PlantedConfig(n_features=40, n_exclusive=8, mean_active=6, correlation=correlation))
    _, amplitude_BF = fired(dictionary)
    assert dictionary.rate_F.sum().item() == pytest.approx(6, rel=1e-4)
    assert dictionary.rate_F.max() <= 0.5
    torch.testing.assert_close((amplitude_BF > 0).float().mean(0), dictionary.rate_F, atol=0.015, rtol=0)
    active = amplitude_BF[amplitude_BF > 0]
    assert active.min() >= 0.5 and active.max() <= 1.5 and active.mean().item() == pytest.approx(1.0, abs=0.01)


def test_rates_follow_a_power_law():
    rate_F = PlantedDictionary(PlantedConfig(n_features=200, mean_active=4, zipf_exponent=1.0)).rate_F
    ordered = rate_F.sort(descending=True).values
    torch.testing.assert_close(ordered[19] / ordered[199], torch.tensor(10.0), rtol=1e-4, atol=0)


def test_correlated_features_fire_together_only_within_their_group():
    config = PlantedConfig(n_features=16, n_exclusive=0, mean_active=3, zipf_exponent=0, correlation=0.9, group_size=4)
    _, amplitude_BF = fired(PlantedDictionary(config))
    correlation_FF = torch.corrcoef((amplitude_BF > 0).float().T)
    assert correlation_FF[0, 1] > 0.5
    assert correlation_FF[0, 4].abs() < 0.05
    _, independent_BF = fired(PlantedDictionary(config.model_copy(update={"correlation": 0.0})))
    assert torch.corrcoef((independent_BF > 0).float().T)[0, 1].abs() < 0.05


def test_exclusive_features_are_absent_from_the_other_models():
    dictionary = PlantedDictionary(PlantedConfig(n_features=30, n_exclusive=9, n_models=3, n_hookpoints=2, d_model=5))
    norm_FMP = dictionary.directions_FMPD.norm(dim=-1)
    assert (dictionary.model_F >= 0).sum() == 9
    for feature, model in enumerate(dictionary.model_F.tolist()):
        expected = torch.ones(3, 2) if model < 0 else torch.zeros(3, 2).index_fill(0, torch.tensor(model), 1.0)
        torch.testing.assert_close(norm_FMP[feature], expected)
    assert dictionary.model_F[dictionary.model_F >= 0].bincount().tolist() == [3, 3, 3]


@pytest.mark.parametrize("shared_directions", ["same", "independent"])
def test_shared_features_have_one_direction_or_one_for_each_model(shared_directions):
    config = PlantedConfig(n_features=10, n_exclusive=0, shared_directions=shared_directions, mean_active=2)
    directions = PlantedDictionary(config).directions_FMPD
    assert torch.equal(directions[:, 0], directions[:, 1]) == (shared_directions == "same")


def test_activations_are_the_sum_of_what_fires_plus_noise():
    dictionary = PlantedDictionary(PlantedConfig(n_features=40, n_exclusive=8, mean_active=6, noise=0.1))
    acts_BMPD, amplitude_BF = fired(dictionary)
    noise_BMPD = acts_BMPD - torch.einsum("bf,fmpd->bmpd", amplitude_BF, dictionary.directions_FMPD)
    assert noise_BMPD.std().item() == pytest.approx(0.1, rel=0.02)
    assert noise_BMPD.mean().abs() < 1e-3


def test_the_stream_is_scaled_reproducible_and_resumable():
    dictionary = PlantedDictionary(PlantedConfig(n_features=40, mean_active=6, n_exclusive=8))
    stream = SyntheticActivations(dictionary, 256, seed=3)
    assert stream.dims == (2, 1, 64)
    batches = [batch for _, batch in zip(range(4), stream, strict=False)]
    assert batches[0].norm(dim=-1).mean().item() == pytest.approx(8.0, rel=0.05)
    again = SyntheticActivations(dictionary, 256, seed=3)
    again.load_state_dict({"batch": 2})
    assert torch.equal(next(iter(again)), batches[2])
    assert again.state_dict() == {"batch": 3}
    assert not torch.equal(next(iter(SyntheticActivations(dictionary, 256, seed=4))), batches[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_features": 10, "n_exclusive": 11}, "n_exclusive = 11: must not exceed planted.n_features = 10"),
        ({"n_models": 1}, "exclusive features need planted.n_models >= 2"),
        ({"n_features": 10, "n_exclusive": 2, "mean_active": 6}, "mean_active = 6.0: at most half of the 10 features"),
    ],
)
def test_impossible_dictionaries_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        PlantedDictionary(PlantedConfig(**options))
