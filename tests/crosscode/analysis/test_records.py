"""Records of every latent against the same figures from dense activations, in float64."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from crosscode.analysis.encoded import encode_heldout
from crosscode.analysis.geometry import decoder_vectors_LXD
from crosscode.analysis.latents_pass import study_latents
from crosscode.analysis.records import Histograms, logit_positions, study_records
from crosscode.models.architecture import split_for
from crosscode.models.decoder_vectors import decoder_vectors_NXD

NAMES = ["base/h", "tuned/h"]


@pytest.fixture
def found(make_model, make_heldout):
    model, batches = make_model(), make_heldout(sizes=(30, 20))
    W_XVD = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(1))
    split = split_for("model_hookpoint_acausal")
    unembeds = {x: lambda vectors_ND, W_VD=W_VD: vectors_ND @ W_VD.T for x, W_VD in enumerate(W_XVD)}
    study, records = study_records(model, batches, split, NAMES, unembeds)
    dense = []
    for batch in encode_heldout(model, batches, split):
        dense_BL = torch.zeros(len(batch.position_B), model.n_latents, dtype=torch.float64)
        dense_BL[batch.entries.token_N, batch.entries.latent_N] = batch.entries.value_N.double()
        dense.append(dense_BL)
    return model, batches, split, study, records, torch.cat(dense), W_XVD


def test_histograms_count_every_firing_in_its_bin(found):
    _, _, _, _, records, dense_BL, _ = found
    for latent in range(dense_BL.shape[1]):
        values = dense_BL[:, latent][dense_BL[:, latent] > 0].numpy()
        upper = records.histograms.upper_L[latent]
        expected, _ = np.histogram(values, bins=64, range=(0, upper or 1))
        counts = records.histograms.counts_LN[latent]
        assert counts.sum() == len(values) and np.abs(np.cumsum(counts) - np.cumsum(expected)).max() <= 1
        assert len(values) == 0 or values.max() <= upper < 2 * values.max()


def test_neighbours_are_the_most_similar_latents(found):
    model, _, _, _, records, dense_BL, _ = found
    W_LF = torch.nn.functional.normalize(decoder_vectors_LXD(model).double().flatten(1))
    fires_BL = (dense_BL > 0).double()
    n_L = fires_BL.sum(0).clamp(min=1)
    together_LL = fires_BL.T @ fires_BL / (n_L[:, None] * n_L).sqrt()
    for neighbours, all_LL in ((records.by_decoder, W_LF @ W_LF.T), (records.by_firing, together_LL)):
        all_LL.fill_diagonal_(-torch.inf)
        torch.testing.assert_close(neighbours.similarity_LK.double(), all_LL.topk(8).values, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            neighbours.similarity_LK.double(), all_LL.gather(1, neighbours.latent_LK), rtol=1e-5, atol=1e-6
        )


def test_logits_are_those_of_the_decoder_vectors(found):
    model, _, _, _, records, _, W_XVD = found
    for x, name in enumerate(NAMES):
        logits_LV = decoder_vectors_NXD(model)[:, x].double() @ W_XVD[x].double().T
        ends = records.logits[name]
        torch.testing.assert_close(ends.top_LE.double(), logits_LV.topk(10).values, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            ends.bottom_LE.double(), logits_LV.gather(1, ends.bottom_id_LE), rtol=1e-5, atol=1e-5
        )
        assert bool((ends.bottom_LE[:, :-1] <= ends.bottom_LE[:, 1:]).all()) and bool(ends.writes_L.all())


def test_the_pass_is_the_one_of_the_report_and_the_text_is_kept(found):
    model, batches, split, study, records, _, _ = found
    alone = study_latents(model, batches, split, NAMES)
    assert torch.equal(alone.firing.counts_L, study.firing.counts_L)
    tokens = [row for batch in batches for row in batch.tokens_HS.tolist()]
    assert [one.tolist() for one in records.texts.sequences] == tokens
    for latent in range(model.n_latents):
        for example in study.top.examples(latent):
            assert records.texts.sequences[example.sequence][example.position] == example.tokens[example.peak]


def test_a_histogram_widens_without_losing_counts(make_model, make_heldout):
    model, split = make_model(), split_for("model_hookpoint_acausal")
    [small], [large] = make_heldout(sizes=(5,)), make_heldout(sizes=(5,), seed=1)
    large.acts_HSMPD *= 100
    widened = Histograms(model.n_latents)
    n = 0
    for batch in encode_heldout(model, [small, large], split, max_tokens=12):
        widened.update(batch)
        n += len(batch.entries.value_N)
    assert widened.counts_LN.sum() == n


def test_of_many_positions_the_last_of_each_model_and_part_has_logits(make_model):
    model = make_model()
    assert logit_positions(model, NAMES) == [0, 1]
    names = [f"{m}/{p}" for m in "ab" for p in range(3)]
    one_part = SimpleNamespace(outputs_of_parts=(slice(0, 6),))
    assert logit_positions(one_part, names) == [2, 5] and logit_positions(one_part, names, {0, 1, 2, 3, 4}) == [2, 4]
    layers = SimpleNamespace(outputs_of_parts=tuple(slice(x, x + 1) for x in range(6)))
    assert logit_positions(layers, [f"a/{p}" for p in range(6)]) == [0, 1, 2, 3, 4, 5]
