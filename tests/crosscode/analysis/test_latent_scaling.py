"""Latent scaling against least squares on dense arrays, and on latents whose nature is known."""

import numpy as np
import pytest
import torch

from crosscode.analysis.encoded import collect, encode_heldout
from crosscode.analysis.latent_scaling import LatentScaling
from crosscode.models.architecture import split_for

SPLIT = split_for("model_hookpoint_acausal")


def scaling_of(model, heldout, a=0, b=1, **options):
    scaling = LatentScaling(model, a, b, **options)
    collect(encode_heldout(model, heldout, SPLIT), scaling)
    return scaling.result()


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("a, b", [(0, 1), (2, 1)])
def test_betas_are_the_least_squares_solution(make_model, make_heldout, backend, a, b):
    model, heldout = make_model(2, 2, backend=backend), make_heldout(2, 2)
    found = scaling_of(model, heldout, a, b, max_entries=7)
    s = model.folded_scaling_out_Xo.flatten().double().numpy()[:, None]
    with torch.no_grad():
        raw = torch.cat([batch.acts_HSMPD[batch.mask_HS] for batch in heldout])
        f_BL = model.encode(raw).double().numpy()
        output_BXD = model(raw).flatten(1, 2).double().numpy() * s
    target_BXD = raw.flatten(1, 2).double().numpy() * s
    W_dec_LXD = model.W_dec_LXoDo.detach().flatten(1, 2).double().numpy() * s
    for latent in range(model.n_latents):
        f_B = f_BL[:, latent]
        pair = W_dec_LXD[latent, [a, b]]
        owner = int(np.linalg.norm(pair[1]) > np.linalg.norm(pair[0]))
        assert found.owner_L[latent] == owner
        design = np.outer(f_B, pair[owner]).reshape(-1, 1)
        for column, x in enumerate((a, b)):
            without = output_BXD[:, x] - np.outer(f_B, W_dec_LXD[latent, x])
            beta_error = np.linalg.lstsq(design, (target_BXD[:, x] - without).ravel(), rcond=None)[0][0]
            beta_reconstruction = np.linalg.lstsq(design, output_BXD[:, x].ravel(), rcond=None)[0][0]
            if f_B.any():
                assert found.error.beta_L2[latent, column].item() == pytest.approx(beta_error, rel=1e-4, abs=1e-5)
                assert found.reconstruction.beta_L2[latent, column].item() == pytest.approx(
                    beta_reconstruction, rel=1e-4, abs=1e-5
                )
                centred = (target_BXD[:, x] - target_BXD[:, x].mean(0)).ravel()
                middle = np.outer(f_B - f_B.mean(), pair[owner]).reshape(-1, 1)
                beta = np.linalg.lstsq(middle, centred, rcond=None)[0][0]
                assert found.activation.beta_L2[latent, column].item() == pytest.approx(beta, rel=1e-4, abs=1e-5)
                along_other = np.outer(f_B - f_B.mean(), pair[1 - owner]).reshape(-1, 1)
                beta = np.linalg.lstsq(along_other, centred, rcond=None)[0][0]
                assert found.returned.beta_L2[latent, column].item() == pytest.approx(beta, rel=1e-4, abs=1e-5)
            else:
                assert found.error.beta_L2[latent, column].isnan()
        expected = found.error.beta_L2[latent, 1 - owner] / found.error.beta_L2[latent, owner]
        torch.testing.assert_close(found.error.nu_L[latent], expected, equal_nan=True)
        expected = found.returned.beta_L2[latent, owner] / found.returned.beta_L2[latent, 1 - owner]
        torch.testing.assert_close(found.returned.nu_L[latent], expected, equal_nan=True)


def test_a_latent_of_one_model_is_told_from_one_whose_norm_was_only_shrunk(make_model, make_heldout):
    model = make_model(d_model=8, n_latents=2, k=2, folded=False)
    e = torch.eye(8)
    with torch.no_grad():
        model.b_enc_L.zero_()
        model.b_dec_XoDo.zero_()
        model.W_enc_LXiDi.zero_()
        model.W_dec_LXoDo.zero_()
        # both decode to b alone; the first is also in a's activations, though the decoder does not say so
        for latent in range(2):
            model.W_enc_LXiDi[latent, 1, 0] = e[latent]
            model.W_dec_LXoDo[latent, 1, 0] = e[latent]
    heldout = make_heldout(sizes=(40,))
    f = torch.rand(*heldout[0].tokens_HS.shape, 2) + 0.5
    noise = 0.01 * heldout[0].acts_HSMPD
    heldout[0].acts_HSMPD = noise
    noise[:, :, 1, 0] += f[..., :1] * e[0] + f[..., 1:] * e[1]
    noise[:, :, 0, 0] += f[..., :1] * e[0]
    result = scaling_of(model, heldout)
    assert result.error.nu_L[0].item() == pytest.approx(1, abs=0.05)
    assert result.error.nu_L[1].item() == pytest.approx(0, abs=0.05)
    for share in result.shares.values():
        assert share.below_z_L[1] > 5 and share.owner_z_L[1] > 5
    assert result.error.below_z_L[0] < -5 and result.activation.below_z_L[0] < -5


def test_equal_decoders_and_activations_give_ratios_of_one(make_model, make_heldout):
    model, heldout = make_model(folded=False), make_heldout()
    with torch.no_grad():
        model.W_dec_LXoDo[:, 1] = model.W_dec_LXoDo[:, 0]
        model.b_dec_XoDo[1] = model.b_dec_XoDo[0]
    for batch in heldout:
        batch.acts_HSMPD[:, :, 1] = batch.acts_HSMPD[:, :, 0]
    result = scaling_of(model, heldout)
    fired = ~result.error.nu_L.isnan()
    assert int(fired.sum()) > 10 and result.difference == 0
    for share in result.shares.values():
        torch.testing.assert_close(share.nu_L[fired], torch.ones(int(fired.sum()), dtype=torch.float64))


def test_standard_errors_and_the_difference_are_those_of_dense_arrays(make_model, make_heldout):
    model, heldout = make_model(folded=False), make_heldout(sizes=(40,))
    found = scaling_of(model, heldout)
    raw_BMD = heldout[0].acts_HSMPD[heldout[0].mask_HS][:, :, 0].double()
    with torch.no_grad():
        f_BL = model.encode(raw_BMD[:, :, None].float()).double()
    centred_BMD = raw_BMD - raw_BMD.mean(0)
    latent = int((f_BL > 0).sum(0).argmax())
    owner, fires = int(found.owner_L[latent]), f_BL[:, latent] > 0
    d_D = model.W_dec_LXoDo[latent, owner, 0].detach().double()
    t_N2 = f_BL[fires, latent][:, None] * (centred_BMD[fires] @ d_D)
    q_N = 2 / 3 * t_N2[:, owner] - t_N2[:, 1 - owner]
    z = q_N.sum() / (q_N.std() * len(q_N) ** 0.5)
    assert found.activation.below_z_L[latent].item() == pytest.approx(z.item(), rel=1e-5)
    variance = centred_BMD.square().sum() / 2
    assert found.difference == pytest.approx((raw_BMD[:, 0] - raw_BMD[:, 1]).square().sum().item() / variance.item())
