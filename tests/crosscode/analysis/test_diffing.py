"""The diffing table against loops over single latents."""

import math

import numpy as np
import pytest
import torch

from crosscode.analysis.diffing import FiringStats, diff_latents
from crosscode.analysis.encoded import collect, encode_heldout
from crosscode.errors import InputError
from crosscode.models.architecture import split_for

SPLIT = split_for("model_hookpoint_acausal")
NAMES = ["base/h", "tuned/h"]


@pytest.mark.parametrize("a, b", [(0, 1), (1, 0), (0, 3), (3, 2)])
def test_norms_and_cosines_agree_with_numpy_in_the_scale_of_training(make_model, a, b):
    unfolded = make_model(2, 2, folded=False)
    scaling_MP = torch.tensor([[0.5, 2.0], [3.0, 1.0]])
    model = unfolded.with_folded_scaling_factors(scaling_MP, scaling_MP)
    table = diff_latents(model, ["a/1", "a/2", "b/1", "b/2"], a, b)
    W_dec = unfolded.W_dec_LXoDo.detach().double().numpy().reshape(24, 4, -1)
    W_enc = unfolded.W_enc_LXiDi.detach().double().numpy().reshape(24, 4, -1)
    for latent in range(24):
        d_a, d_b, e_a, e_b = W_dec[latent, a], W_dec[latent, b], W_enc[latent, a], W_enc[latent, b]
        n_a, n_b = np.linalg.norm(d_a), np.linalg.norm(d_b)
        assert table.decoder_norm_a[latent].item() == pytest.approx(n_a, rel=1e-5)
        assert table.decoder_norm_b[latent].item() == pytest.approx(n_b, rel=1e-5)
        assert table.relative_norm[latent].item() == pytest.approx(n_b / (n_a + n_b), rel=1e-5)
        assert table.decoder_cosine[latent].item() == pytest.approx(d_a @ d_b / n_a / n_b, rel=1e-4, abs=1e-5)
        assert table.encoder_norm_a[latent].item() == pytest.approx(np.linalg.norm(e_a), rel=1e-5)
        cosine = e_a @ e_b / np.linalg.norm(e_a) / np.linalg.norm(e_b)
        assert table.encoder_cosine[latent].item() == pytest.approx(cosine, rel=1e-4, abs=1e-5)


def test_relative_norm_points_from_a_to_b(make_model):
    model = make_model(folded=False)
    with torch.no_grad():
        model.W_dec_LXoDo[0, 1] = 0
        model.W_dec_LXoDo[1, 0] = 0
        model.W_dec_LXoDo[2, 1] = model.W_dec_LXoDo[2, 0]
        model.W_dec_LXoDo[3] = 0
    table = diff_latents(model, NAMES, 0, 1)
    assert table.relative_norm[:3].tolist() == pytest.approx([0, 1, 0.5])
    assert math.isnan(table.relative_norm[3]) and math.isnan(table.decoder_cosine[0])
    assert table.decoder_cosine[2].item() == pytest.approx(1)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_firing_agrees_with_dense_latents(make_model, make_heldout, backend):
    model, heldout = make_model(backend=backend), make_heldout()
    firing = FiringStats(model.n_latents)
    collect(encode_heldout(model, heldout, SPLIT, max_tokens=20), firing)
    with torch.no_grad():
        dense_BL = model.encode(torch.cat([b.acts_HSMPD[b.mask_HS] for b in heldout]))
    assert firing.n_tokens == dense_BL.shape[0]
    torch.testing.assert_close(firing.density_L, (dense_BL > 0).double().mean(0))
    torch.testing.assert_close(firing.max_L, dense_BL.max(0).values)
    mean_active = torch.stack([c[c > 0].mean() if (c > 0).any() else c.new_zeros(()) for c in dense_BL.T])
    torch.testing.assert_close(firing.mean_active_L.float(), mean_active)


def test_wrong_positions_are_refused(make_model):
    with pytest.raises(InputError, match=r"positions \(1, 1\)"):
        diff_latents(make_model(), NAMES, 1, 1)
    with pytest.raises(InputError, match=r"positions \(0, 2\)"):
        diff_latents(make_model(), NAMES, 0, 2)
    with pytest.raises(InputError, match="2 output positions, got 3 names"):
        diff_latents(make_model(), [*NAMES, "x"], 0, 1)
