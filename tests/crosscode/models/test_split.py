"""Harvested activations -> input and target, for each architecture.

Axes: B tokens · M models · P hookpoints · D width.
"""

from __future__ import annotations

import pytest
import torch

from crosscode.errors import InputError
from crosscode.models import ARCHITECTURES, TopkActivation
from crosscode.models.architecture import split_for

NAMES = [["a/0", "a/1", "a/2", "a/3"]]


def acts(n_models, n_hookpoints):
    return torch.arange(6 * n_models * n_hookpoints * 5.0).reshape(6, n_models, n_hookpoints, 5)


def scaling(n_models, n_hookpoints):
    return torch.arange(1.0, 1 + n_models * n_hookpoints).reshape(n_models, n_hookpoints)


def test_acausal_is_the_identity():
    acts_BMPD, scaling_MP = acts(2, 3), scaling(2, 3)
    split = split_for("model_hookpoint_acausal")
    assert all(torch.equal(part, acts_BMPD) for part in split.activations(acts_BMPD))
    assert all(torch.equal(part, scaling_MP) for part in split.scaling(scaling_MP))
    assert split.output_names([["a/0", "a/1"], ["b/0", "b/1"]]) == ["a/0", "a/1", "b/0", "b/1"]


def test_sae_squeezes():
    split = split_for("sae")
    input_BD, target_BD = split.activations(acts(1, 1))
    assert torch.equal(input_BD, acts(1, 1)[:, 0, 0]) and torch.equal(target_BD, input_BD)
    assert [factor.item() for factor in split.scaling(scaling(1, 1))] == [1.0, 1.0]
    assert split.output_names([["a/0"]]) == ["a/0"]


def test_a_difference_is_the_second_model_minus_the_first():
    split, acts_BMPD = split_for("diff_sae"), torch.randn(6, 2, 1, 5, generator=torch.Generator().manual_seed(0))
    wanted_BD = acts_BMPD[:, 1, 0] - acts_BMPD[:, 0, 0]
    assert all(torch.equal(part, wanted_BD) for part in split.activations(acts_BMPD))
    assert [factor.item() for factor in split.scaling(torch.tensor([[3.0], [3.0]]))] == [3.0, 3.0]
    with pytest.raises(InputError, match=r"both models must be scaled by the same factor, got \[1.0, 2.0\]"):
        split.scaling(scaling(2, 1))
    assert all(torch.equal(split.as_scaled(acts_BMPD)[:, m, 0], wanted_BD) for m in range(2))
    with pytest.raises(InputError, match="the two models have the same activations: no difference"):
        split.as_scaled(acts_BMPD[:, :1].expand(6, 2, 1, 5))
    assert split.output_names([["base/h"], ["org/tuned/h"]]) == ["org/tuned - base/h"]
    assert split.output_places(2, 1) == [(1, 0)]
    assert torch.equal(split.beside(acts_BMPD), acts_BMPD[:, 0, 0]) and split_for("sae").beside(acts(1, 1)) is None
    for n_models in (1, 3):
        with pytest.raises(InputError, match=f"reads the difference of two language models, got {n_models}"):
            split.check(n_models, 1)


def test_transcoder_reads_the_first_and_predicts_the_second():
    split = split_for("transcoder")
    input_BD, target_BD = split.activations(acts(1, 2))
    assert torch.equal(input_BD, acts(1, 2)[:, 0, 0]) and torch.equal(target_BD, acts(1, 2)[:, 0, 1])
    assert [factor.item() for factor in split.scaling(scaling(1, 2))] == [1.0, 2.0]
    assert split.output_names([NAMES[0][:2]]) == ["a/1"]


def test_cross_layer_transcoder_predicts_the_rest():
    split = split_for("cross_layer_transcoder")
    input_BD, target_BPD = split.activations(acts(1, 4))
    assert torch.equal(input_BD, acts(1, 4)[:, 0, 0]) and torch.equal(target_BPD, acts(1, 4)[:, 0, 1:])
    assert split.scaling(scaling(1, 4))[1].tolist() == [2.0, 3.0, 4.0]
    assert split.output_names(NAMES) == ["a/1", "a/2", "a/3"]


def test_compound_takes_all_inputs_then_all_outputs():
    split = split_for("compound_cross_layer_transcoder")
    input_BPD, target_BPD = split.activations(acts(1, 4))
    assert torch.equal(input_BPD, acts(1, 4)[:, 0, :2]) and torch.equal(target_BPD, acts(1, 4)[:, 0, 2:])
    assert [part.tolist() for part in split.scaling(scaling(1, 4))] == [[1.0, 2.0], [3.0, 4.0]]
    assert split.output_names(NAMES) == ["a/2", "a/3"]


@pytest.mark.parametrize("kind", list(ARCHITECTURES))
def test_the_model_of_a_split_takes_what_it_yields(kind):
    n_models = 2 if kind in ("model_hookpoint_acausal", "diff_sae") else 1
    n_hookpoints = {"sae": 1, "diff_sae": 1, "transcoder": 2}.get(kind, 4)
    split = split_for(kind)
    dims = ARCHITECTURES[kind].dims_for(n_models, n_hookpoints, 5)
    model = ARCHITECTURES[kind](**dims, n_latents=8, activation_fn=TopkActivation(2, 8))
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(0.1)
    input_BXiDi, target_BXoDo = split.activations(acts(n_models, n_hookpoints))
    assert model(input_BXiDi).shape == target_BXoDo.shape
    scaling_MP = torch.full((2, 1), 3.0) if kind == "diff_sae" else scaling(n_models, n_hookpoints)
    model.fold_activation_scaling_into_weights_(*split.scaling(scaling_MP))


@pytest.mark.parametrize("leading", [(), (2, 3)])
def test_any_leading_axes(leading):
    acts_MPD = torch.randn(*leading, 1, 4, 5)
    input_, target = split_for("cross_layer_transcoder").activations(acts_MPD)
    assert input_.shape == (*leading, 5) and target.shape == (*leading, 3, 5)


@pytest.mark.parametrize(
    ("kind", "n_models", "n_hookpoints", "message"),
    [
        ("sae", 2, 1, "crosscoder.type = 'sae': reads one language model, got 2"),
        ("sae", 1, 2, r"crosscoder.type = 'sae': reads and reconstructs exactly one hookpoint, got 2 hookpoint\(s\)"),
        ("transcoder", 1, 3, "exactly two hookpoints"),
        ("cross_layer_transcoder", 1, 1, "at least two hookpoints"),
        ("compound_cross_layer_transcoder", 1, 3, "as many output as input hookpoints"),
        ("model_hookpoint_acausal", 0, 1, "reads one language model, got 0|at least one"),
    ],
)
def test_hookpoints_that_do_not_fit_are_refused(kind, n_models, n_hookpoints, message):
    with pytest.raises(InputError, match=message):
        split_for(kind).check(n_models, n_hookpoints)


def test_an_unknown_architecture_gets_a_hint():
    with pytest.raises(InputError, match=r"crosscoder: unknown type 'transcode' \(did you mean 'transcoder'\?\)"):
        split_for("transcode")
