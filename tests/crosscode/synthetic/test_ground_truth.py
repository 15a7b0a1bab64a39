"""Matching of learned with planted features.

Axes: F features · L latents · M models · P hookpoints · D width.
"""

from __future__ import annotations

import math

import pytest
import torch

from crosscode.errors import InputError
from crosscode.synthetic.ground_truth import called_exclusive_L, compare_with_planted


def planted():
    """Four features of two models, in orthogonal directions: two shared, one of each model alone."""
    directions_FMPD = torch.zeros(4, 2, 1, 4)
    directions_FMPD[[0, 0, 1, 1], [0, 1, 0, 1], 0, [0, 0, 1, 1]] = 1.0
    directions_FMPD[2, 0, 0, 2] = 1.0
    directions_FMPD[3, 1, 0, 3] = 1.0
    return directions_FMPD, torch.tensor([-1, -1, 0, 1])


def test_a_perfect_dictionary_in_any_order_scale_and_sign():
    directions_FMPD, model_F = planted()
    decoder_LMPD = torch.cat(
        [
            directions_FMPD[[3, 1, 0, 2]] * torch.tensor([2.0, -0.5, 1.0, 3.0])[:, None, None, None],
            torch.zeros(2, 2, 1, 4),
        ]
    )
    truth = compare_with_planted(directions_FMPD, model_F, decoder_LMPD)
    assert truth.all.matched_cosine == pytest.approx(1.0) and truth.all.recovered == 1.0
    assert truth.shared.n_features == truth.exclusive.n_features == 2
    assert (truth.precision, truth.recall) == (1.0, 1.0)


def test_one_latent_cannot_stand_for_two_features():
    directions_FMPD, model_F = planted()
    both_MPD = directions_FMPD[0] + directions_FMPD[1]
    decoder_LMPD = torch.stack([both_MPD, torch.zeros_like(both_MPD), directions_FMPD[2], directions_FMPD[3]])
    truth = compare_with_planted(directions_FMPD, model_F, decoder_LMPD)
    assert truth.shared.matched_cosine == pytest.approx(math.sqrt(0.5) / 2), "matched once only"
    assert truth.shared.mean_max_cosine == pytest.approx(math.sqrt(0.5))
    assert truth.exclusive.matched_cosine == pytest.approx(1.0)


def test_a_shared_latent_for_an_exclusive_feature_lowers_recall_and_the_reverse_precision():
    directions_FMPD, model_F = planted()
    leaky = directions_FMPD.clone()
    leaky[2, 1, 0, 2] = 0.5
    truth = compare_with_planted(directions_FMPD, model_F, leaky)
    assert (truth.precision, truth.recall) == (1.0, 0.5)
    one_sided = directions_FMPD.clone()
    one_sided[0, 1] = 0
    truth = compare_with_planted(directions_FMPD, model_F, one_sided)
    assert (truth.precision, truth.recall) == (pytest.approx(2 / 3), 1.0)


def test_calling_the_wrong_model_is_neither_right_nor_found():
    directions_FMPD, model_F = planted()
    truth = compare_with_planted(directions_FMPD, 1 - model_F.clamp(min=0) - 2 * (model_F < 0).long(), directions_FMPD)
    assert (truth.precision, truth.recall) == (0.0, 0.0)


def test_exclusive_means_above_the_threshold_of_relative_norm():
    decoder_LMPD = torch.tensor([[0.95, 0.05], [0.85, 0.15], [0.0, 1.0], [0.0, 0.0]])[:, :, None, None]
    assert called_exclusive_L(decoder_LMPD).tolist() == [0, -1, 1, -1]
    assert called_exclusive_L(decoder_LMPD, 0.8).tolist() == [0, 0, 1, -1]


def test_without_exclusive_features_there_is_no_recall():
    directions_FMPD, _ = planted()
    truth = compare_with_planted(directions_FMPD[:2], torch.tensor([-1, -1]), directions_FMPD[:2])
    assert truth.exclusive is None and math.isnan(truth.recall) and math.isnan(truth.precision)


def test_dictionaries_that_cannot_be_compared_are_refused():
    directions_FMPD, model_F = planted()
    with pytest.raises(InputError, match="n_latents = 2: at least one for each of the 4 features"):
        compare_with_planted(directions_FMPD, model_F, directions_FMPD[:2])
    with pytest.raises(InputError, match=r"planted features are \(2, 1, 4\)"):
        compare_with_planted(directions_FMPD, model_F, directions_FMPD[..., :3])
