"""The compound cross-layer transcoder against its formula.

Axes: B tokens · P layers · S source layers · D width · L latents of one source layer.
"""

from __future__ import annotations

import pytest
import torch
from crosscode_kernels.sparse import SparseLatents

from crosscode.errors import InputError
from crosscode.models import (
    BatchTopkActivation,
    CompoundCrossLayerTranscoder,
    GroupMaxActivation,
    ReLUActivation,
    TopkActivation,
)

N_LAYERS, D_IN, D_OUT, L = 3, 5, 4, 8


def compound(activation, randomise, *, backend="torch", **options):
    model = CompoundCrossLayerTranscoder(
        N_LAYERS, D_IN, D_OUT, activation.n_latents, activation, backend=backend, dtype=torch.float64, **options
    )
    return randomise(model)


@pytest.fixture
def x_BPD():
    return torch.randn(10, N_LAYERS, D_IN, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def preacts_SBL(model, x_BPD):
    """From the formula: source layer s reads the input of layer s."""
    return [x_BPD[:, s] @ part.W_enc_LXiDi.T + part.b_enc_L for s, part in enumerate(model.parts)]


def decode_by_hand(model, latents_SBL, x_BPD, own_layer=True, later_layers=True):
    y_BPD = torch.zeros(x_BPD.shape[0], N_LAYERS, D_OUT, dtype=torch.float64)
    for s, (part, a_BL) in enumerate(zip(model.parts, latents_SBL, strict=True)):
        first = s if own_layer else s + 1
        for out, layer in enumerate(range(first, N_LAYERS if later_layers else first + 1)):
            y_BPD[:, layer] += a_BL @ part.W_dec_LXoDo[:, out]
            if part.W_skip_XiDiXoDo is not None:
                y_BPD[:, layer] += x_BPD[:, s] @ part.W_skip_XiDiXoDo[:, out]
    return y_BPD + model.b_dec_XoDo


def keep_largest(values, k):
    """The k largest of each row, by sorting."""
    order = values.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(values).scatter(1, order, values.gather(1, order))


@pytest.mark.parametrize("own_layer", [True, False])
@pytest.mark.parametrize("linear_skip", [True, False])
def test_outputs_sum_over_source_layers(own_layer, linear_skip, x_BPD, randomise):
    n_sources = N_LAYERS if own_layer else N_LAYERS - 1
    model = compound(ReLUActivation(n_sources * L), randomise, own_layer=own_layer, linear_skip=linear_skip)
    latents_SBL = [h_BL.relu() for h_BL in preacts_SBL(model, x_BPD)]
    expected_BPD = decode_by_hand(model, latents_SBL, x_BPD, own_layer)
    torch.testing.assert_close(model(x_BPD), expected_BPD, rtol=0, atol=1e-12)
    torch.testing.assert_close(model.encode(x_BPD), torch.cat(latents_SBL, 1), rtol=0, atol=1e-12)
    if not own_layer:
        skip_free = model(x_BPD) if not linear_skip else None
        assert skip_free is None or torch.equal(skip_free[:, 0], model.b_dec_XoDo[0].expand(10, D_OUT))


@pytest.mark.parametrize("linear_skip", [True, False])
def test_a_set_is_a_transcoder_for_each_layer(linear_skip, x_BPD, randomise):
    model = compound(ReLUActivation(3 * L), randomise, later_layers=False, linear_skip=linear_skip)
    latents_SBL = [h_BL.relu() for h_BL in preacts_SBL(model, x_BPD)]
    expected_BPD = decode_by_hand(model, latents_SBL, x_BPD, later_layers=False)
    torch.testing.assert_close(model(x_BPD), expected_BPD, rtol=0, atol=1e-12)
    norms_LX = model.decoder_norms().norms_LX
    assert torch.equal(norms_LX > 0, torch.eye(3, dtype=torch.bool).repeat_interleave(L, 0))
    with pytest.raises(InputError, match="nothing would be written"):
        compound(ReLUActivation(3 * L), randomise, later_layers=False, own_layer=False)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_topk_of_each_layer_and_over_all_layers(backend, x_BPD, randomise):
    per_layer = compound(TopkActivation(2, 3 * L), randomise, backend=backend)
    latents_SBL = [keep_largest(h_BL.relu(), 2) for h_BL in preacts_SBL(per_layer, x_BPD)]
    torch.testing.assert_close(per_layer.encode(x_BPD), torch.cat(latents_SBL, 1))
    over_all = compound(TopkActivation(5, 3 * L), randomise, backend=backend, topk_scope="all_layers")
    joint_BL = keep_largest(torch.cat(preacts_SBL(over_all, x_BPD), 1).relu(), 5)
    torch.testing.assert_close(over_all.encode(x_BPD), joint_BL)
    torch.testing.assert_close(over_all(x_BPD), decode_by_hand(over_all, joint_BL.chunk(3, 1), x_BPD))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("make", [TopkActivation, BatchTopkActivation])
@pytest.mark.parametrize("k", [L + 2, 3 * L])
def test_k_over_all_layers_may_reach_all_latents(make, k, backend, x_BPD, randomise, tmp_path):
    model = compound(make(k, 3 * L), randomise, backend=backend, topk_scope="all_layers")
    a_BL = torch.cat(preacts_SBL(model, x_BPD), 1).relu()
    n_kept = k * len(x_BPD) if make is BatchTopkActivation else k
    kept_BL = keep_largest(a_BL.reshape(1, -1) if make is BatchTopkActivation else a_BL, n_kept).reshape(a_BL.shape)
    result = model.forward_train(x_BPD)
    torch.testing.assert_close(result.latents.to_dense(), kept_BL)
    model.after_step(result.latents)
    model.save(tmp_path / "model")
    again = CompoundCrossLayerTranscoder.load(tmp_path / "model")
    assert [fn.k for fn in again.activation_fns] == [k] * 3
    with pytest.raises(InputError, match=f"k = {k}: must be between 1 and n_latents = {L}"):
        compound(make(k, 3 * L), randomise, backend=backend)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("rank_by", ["activation", "decoder_norm_weighted"])
def test_batch_topk_over_all_layers(backend, rank_by, x_BPD, randomise):
    activation = BatchTopkActivation(3, 3 * L, rank_by=rank_by)
    model = compound(activation, randomise, backend=backend, topk_scope="all_layers")
    a_BL = torch.cat(preacts_SBL(model, x_BPD), 1).relu()
    n_L = model.decoder_norms().n_L if rank_by == "decoder_norm_weighted" else torch.ones(3 * L, dtype=torch.float64)
    rank_BL = a_BL * n_L
    smallest = rank_BL.flatten().sort(descending=True).values[3 * 10 - 1]
    kept_BL = torch.where(rank_BL >= smallest, a_BL, 0.0)
    result = model.forward_train(x_BPD)
    torch.testing.assert_close(result.latents.to_dense(), kept_BL)
    model.after_step(result.latents)
    for fn in model.activation_fns:
        assert fn.threshold.item() == pytest.approx(smallest.item())
    model.eval()
    torch.testing.assert_close(model.encode(x_BPD), kept_BL, msg="the threshold reproduces this very batch")


def test_every_source_layer_has_an_activation_of_its_own(x_BPD, randomise):
    model = compound(BatchTopkActivation(2, 3 * L), randomise)
    result = model.forward_train(x_BPD)
    model.after_step(result.latents)
    expected = []
    for h_BL in preacts_SBL(model, x_BPD):
        expected.append(h_BL.relu().flatten().sort(descending=True).values[2 * 10 - 1].item())
    assert [fn.threshold.item() for fn in model.activation_fns] == pytest.approx(expected)
    assert len({id(fn) for fn in model.activation_fns}) == 3


def test_decoder_norms_are_joint_over_the_outputs_of_a_latent(randomise):
    model = compound(TopkActivation(2, 3 * L), randomise)
    norms = model.decoder_norms()
    expected = torch.cat([part.W_dec_LXoDo.flatten(1).norm(dim=1) for part in model.parts])
    torch.testing.assert_close(norms.n_L, expected)
    assert norms.norms_LX.shape == (3 * L, N_LAYERS)
    assert not norms.norms_LX[2 * L :, :2].any(), "the last source layer writes to the last output only"


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_dead_latents_are_chosen_over_all_layers(backend, x_BPD, randomise):
    model = compound(TopkActivation(2, 3 * L), randomise, backend=backend)
    dead_L = torch.zeros(3 * L, dtype=torch.bool)
    dead_L[[0, 1, 2, L + 1, L + 4, 2 * L, 2 * L + 7]] = True
    a_BL = torch.where(dead_L, torch.cat(preacts_SBL(model, x_BPD), 1).relu(), 0.0)
    expected = decode_by_hand(model, keep_largest(a_BL, 3).chunk(3, 1), x_BPD) - model.b_dec_XoDo
    assert model.dead_recon_loss(x_BPD, dead_L, 3, -expected.flatten(1)) < 1e-10 * expected.square().mean()


def test_sparse_latents_stay_sparse(x_BPD, randomise):
    model = compound(TopkActivation(2, 3 * L), randomise)
    latents = model.forward_train(x_BPD).latents
    assert isinstance(latents, SparseLatents)
    assert latents.value_N.shape == (10 * 3 * 2,) and latents.n_latents == 3 * L
    assert latents.l0_B().max() <= 6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: CompoundCrossLayerTranscoder(3, 4, 4, 25, TopkActivation(2, 25)),
            "n_latents = 25: must divide by the 3",
        ),
        (
            lambda: CompoundCrossLayerTranscoder(3, 4, 4, 24, GroupMaxActivation(4, 24), topk_scope="all_layers"),
            "crosscoder.topk_scope = 'all_layers': needs crosscoder.activation.type 'topk' or 'batch_topk', got 'groupmax'",
        ),
        (
            lambda: CompoundCrossLayerTranscoder(1, 4, 4, 24, TopkActivation(2, 24), own_layer=False),
            "without own_layer at least two layers",
        ),
        (
            lambda: CompoundCrossLayerTranscoder(4, 4, 4, 24, TopkActivation(12, 24)),
            "activation.k = 12: must be between 1 and n_latents = 6",
        ),
    ],
)
def test_impossible_shapes_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("scope", ["layer", "all_layers"])
@pytest.mark.parametrize("activation", ["topk", "batch_topk"])
def test_k_is_annealed_in_every_layer_or_over_all(scope, activation, make_case):
    annealed = {"type": activation, "k": 2, "k_start": 6, "k_anneal_fraction": 0.5}
    case = make_case("compound", annealed, n_tokens=64, topk_scope=scope)
    with torch.no_grad():
        for part in case.model.parts:
            part.b_enc_L.fill_(100.0)  # so that k latents are positive
    for step, k in ((0, 6), (3, 4), (5, 2), (9, 2)):  # in ten steps
        case.model.before_step(step, 10)
        kept = case.model.encode(case.input_BXiDi) > 0
        layers = [kept] if scope == "all_layers" else kept.chunk(3, dim=1)
        assert [int(layer.sum()) for layer in layers] == [64 * round(6 - 4 * min(step / 5, 1))] * len(layers)
        assert k == round(6 - 4 * min(step / 5, 1))
