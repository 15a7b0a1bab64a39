"""The table of latents as a frame, as CSV, as parquet.

L latents.
"""

import csv

import numpy as np
import pandas
import pytest
import torch

from crosscode.analysis.latents_frame import latents_frame, write_csv, write_parquet
from crosscode.analysis.latents_pass import study_latents
from crosscode.models import ARCHITECTURES, ReLUActivation
from crosscode.models.architecture import split_for

KINDS = {
    "sae": (1, 1, ["base/h"]),
    "transcoder": (1, 2, ["base/h"]),
    "diff_sae": (2, 1, ["tuned - base/h"]),
    "model_hookpoint_acausal": (2, 1, ["base/h", "=tuned/h"]),
    "cross_layer_transcoder": (1, 3, ["base/g", "base/h"]),
    "compound_cross_layer_transcoder": (1, 4, ["base/g", "base/h"]),
}


@pytest.fixture
def study_of(make_heldout):
    def make(kind, dims=None, names=None):
        n_models, n_hookpoints, own_names = KINDS[kind]
        n_models, n_hookpoints = dims or (n_models, n_hookpoints)
        model_class = ARCHITECTURES[kind]
        model = model_class(
            **model_class.dims_for(n_models, n_hookpoints, 8), n_latents=24, activation_fn=ReLUActivation(24)
        )
        generator = torch.Generator().manual_seed(0)
        for param in model.parameters():
            param.data = torch.randn(param.shape, generator=generator)
        heldout = make_heldout(n_models=n_models, n_hookpoints=n_hookpoints)
        return study_latents(model, heldout, split_for(kind), names or own_names)

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_has_a_table_with_a_plain_header(kind, study_of, tmp_path):
    study = study_of(kind)
    frame = latents_frame(study)
    write_csv(frame, tmp_path / "t.csv")
    write_parquet(frame, tmp_path / "t.parquet")
    with (tmp_path / "t.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["latent"] for row in rows] == [str(latent) for latent in range(24)]
    assert [int(row["firings"]) for row in rows] == study.firing.counts_L.tolist()
    pandas.testing.assert_frame_equal(pandas.read_parquet(tmp_path / "t.parquet").set_index("latent"), frame)
    assert set(rows[0]) == {"latent", *frame.columns}


def test_each_latent_of_a_difference_is_undecided_and_says_why(study_of):
    frame = latents_frame(study_of("diff_sae"))
    assert {*frame["tag"]} == {"undecided"} and all("no verdict by model" in why for why in frame["why"])
    assert frame.columns[-1] == "why" and "tag" not in latents_frame(study_of("sae"))


def test_columns_name_the_models(study_of):
    study = study_of("model_hookpoint_acausal", names=["base/h", "tuned/h"])
    frame, pair = latents_frame(study), study.pairs[0]
    expected = pair.decoder_norm_b / (pair.decoder_norm_a + pair.decoder_norm_b)
    np.testing.assert_allclose(frame["relative_norm_tuned"], expected)
    np.testing.assert_allclose(frame["decoder_norm_base"], pair.decoder_norm_a)
    np.testing.assert_allclose(frame["beta_error_tuned"], pair.scaling.error.beta_L2[:, 1])
    (verdict,) = study.verdicts
    assert frame["tag"].tolist() == verdict.names and frame["why"].tolist() == list(verdict.why)
    ranked = frame["rank_tuned"].dropna().sort_values()
    assert ranked.index.tolist() == verdict.ranking("tuned")


def test_several_pairs_have_columns_of_their_own(study_of):
    names = [f"{model}/{hook}" for model in ("a", "b") for hook in ("g", "h")]
    study = study_of("model_hookpoint_acausal", (2, 2), names)
    frame = latents_frame(study)
    for pair, hook in zip(study.pairs, "gh", strict=True):
        np.testing.assert_allclose(frame[f"relative_norm_b/{hook}"], pair.relative_norm)
        np.testing.assert_allclose(frame[f"decoder_cosine_a/{hook}_b/{hook}"], pair.decoder_cosine)


def test_of_three_models_each_two_have_columns_of_their_own(study_of):
    study = study_of("model_hookpoint_acausal", (3, 1), ["a/h", "b/h", "c/h"])
    frame = latents_frame(study)
    for pair, (one, other) in zip(study.pairs, ("ab", "ac", "bc"), strict=True):
        end = f"{other}_{one}_{other}"
        np.testing.assert_allclose(frame[f"relative_norm_{end}"], pair.relative_norm)
        np.testing.assert_allclose(frame[f"beta_error_{end}"], pair.scaling.error.beta_L2[:, 1])


def test_no_name_runs_as_a_formula_of_a_spreadsheet(study_of):
    frame = latents_frame(study_of("model_hookpoint_acausal"))
    assert not any(name.startswith(("=", "+", "-", "@")) for name in frame.columns)
    assert not any(tag.startswith("=") for tag in frame["tag"])
