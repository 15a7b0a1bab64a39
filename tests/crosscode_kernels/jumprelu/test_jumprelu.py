"""JumpReLU, the pre-act penalty, and penalties on its latents.

Axes: B tokens · L latents.
"""

from __future__ import annotations

import math

import pytest
import torch
from crosscode_kernels import DenseLatents

SHAPES = [(1, 1), (7, 63), (64, 257), (2, 1100), (0, 5)]


def jumprelu_grads(h_BL, t_L, da_BL, eps, ste):
    """The straight-through gradients, written out."""
    theta_L = torch.exp(t_L)
    above_BL = (h_BL > theta_L).to(h_BL.dtype)
    window_BL = ((h_BL - theta_L).abs() < eps / 2).to(h_BL.dtype)
    dt_L = -(theta_L / eps * window_BL * da_BL).sum(0)
    return above_BL * da_BL, dt_L * theta_L if ste == "gdm" else dt_L


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ste", ["anthropic", "gdm"])
def test_forward_and_straight_through_gradients(backend, dtype, shape, ste, within_budget):
    B, L = shape
    h_BL = (2 * torch.randn(B, L)).to(backend.device, dtype).requires_grad_()
    t_L = (0.3 * torch.randn(L)).to(backend.device, dtype).requires_grad_()
    da_BL = torch.randn(B, L).to(dtype)
    a_BL = backend.ops.jumprelu(h_BL, t_L, 1.5, ste)
    a_BL.backward(da_BL.to(backend.device))

    h64_BL, t64_L = h_BL.detach().cpu().double(), t_L.detach().cpu().double()
    # The comparison is done in float32: a rounding of theta must not decide differently from the oracle.
    assert not ((h64_BL - t64_L.exp()).abs() < 1e-6).any()
    expected_BL = torch.where(h64_BL > t64_L.exp(), h64_BL, 0)
    within_budget(a_BL, expected_BL, expected_BL, dtype, "a")
    dh64_BL, dt64_L = jumprelu_grads(h64_BL, t64_L, da_BL.double(), 1.5, ste)
    _, dt_eager_L = jumprelu_grads(h64_BL.float(), t64_L.float(), da_BL.float(), 1.5, ste)
    within_budget(h_BL.grad, dh64_BL, dh64_BL, dtype, "dh")
    within_budget(t_L.grad, dt_eager_L, dt64_L, dtype, "dt")


def test_nan_and_inf(backend):
    h_BL = torch.tensor([[float("nan"), float("inf"), -float("inf"), 0.5]], device=backend.device)
    a_BL = backend.ops.jumprelu(h_BL, torch.zeros(4, device=backend.device), 2.0, "anthropic")
    assert a_BL[0, 0].isnan()
    assert a_BL[0, 1:].tolist() == [float("inf"), 0, 0]


def oracle_of_all(h_BL, t_L, n_L, lam_tanh_L, lam_pre_L, da_BL, eps, ste, c, g_tanh, g_pre):
    """Values and gradients of a, tanh and pre-act penalty, written out; upstream da, g_tanh, g_pre."""
    B = max(h_BL.shape[0], 1)
    theta_L = t_L.exp()
    a_BL = torch.where(h_BL > theta_L, h_BL, 0)
    tanh_BL = (c * a_BL * n_L).tanh()
    deficit_BL = (theta_L - h_BL).clamp(min=0)
    slope_BL = lam_tanh_L * (1 - tanh_BL**2) * c / B * g_tanh
    into_a_BL = da_BL + slope_BL * n_L
    dh_BL, dt_L = jumprelu_grads(h_BL, t_L, into_a_BL, eps, ste)
    silent_BL = (h_BL < theta_L).to(h_BL.dtype)
    pre_L = lam_pre_L * n_L / B * g_pre
    dh_BL = dh_BL - silent_BL * pre_L
    dt_L = dt_L + (silent_BL * pre_L * theta_L).sum(0)
    dn_L = (slope_BL * a_BL).sum(0) + (lam_pre_L * deficit_BL).sum(0) / B * g_pre
    tanh = (lam_tanh_L * tanh_BL).sum() / B
    pre_act = (lam_pre_L * n_L * deficit_BL).sum() / B
    return a_BL, tanh, pre_act, dh_BL, dt_L, dn_L


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ste", ["anthropic", "gdm"])
def test_penalties_and_their_gradients(backend, dtype, shape, ste, within_budget):
    B, L = shape
    eps, c, g_tanh, g_pre = 2.0, 4.0, 0.7, 1.3
    h_BL = torch.randn(B, L).to(backend.device, dtype).requires_grad_()
    t_L = (0.3 * torch.randn(L) - 0.3).to(backend.device, torch.float32).requires_grad_()
    n_L = (torch.rand(L) + 0.5).to(backend.device, torch.float32).requires_grad_()
    lam_tanh_L, lam_pre_L = torch.rand(L).to(backend.device), torch.rand(L).to(backend.device)
    da_BL = torch.randn(B, L).to(dtype)
    ops = backend.ops
    a_BL = ops.jumprelu(h_BL, t_L, eps, ste)
    tanh = ops.weighted_tanh(DenseLatents(a_BL), n_L, lam_tanh_L, c)
    pre_act = ops.pre_act(h_BL, t_L, n_L, lam_pre_L)
    torch.autograd.backward([a_BL, tanh, pre_act], [da_BL.to(backend.device), g_tanh + 0 * tanh, g_pre + 0 * pre_act])

    def inputs(dtype):
        tensors = (h_BL, t_L, n_L, lam_tanh_L, lam_pre_L, da_BL)
        return [tensor.detach().cpu().to(dtype) for tensor in tensors]

    expected = oracle_of_all(*inputs(torch.float64), eps, ste, c, g_tanh, g_pre)
    # Statistics are kept in float32 whatever the dtype of h: that is what "eager" does here as well.
    eager = oracle_of_all(*inputs(torch.float32), eps, ste, c, g_tanh, g_pre)
    actual = (a_BL, tanh, pre_act, h_BL.grad, t_L.grad, n_L.grad)
    for name, one, other, truth in zip(("a", "tanh", "pre", "dh", "dt", "dn"), actual, eager, expected, strict=True):
        # dh and the incoming gradient of a are rounded to the dtype of h on the way.
        within_budget(one, other, truth, torch.float32 if name in ("tanh", "pre", "dn") else dtype, name)


def test_the_input_may_have_a_straight_through_gradient_too(backend, dtype, make_problem, oracle, within_budget):
    p = make_problem(65, 24, 130, 9, device=backend.device, segments=(4, 5), dtype=dtype)
    eps, upstream_BL = 1.5, torch.randn(65, 130)
    latents = backend.ops.encode_jumprelu(p.x_BI, p.W_enc_LI, p.b_enc_L, p.t_L, eps, "anthropic", input_gradient=True)
    tensors = (p.W_enc_LI, p.b_enc_L, p.x_BI)
    grads = torch.autograd.grad(latents.value_BL, tensors, upstream_BL.to(latents.value_BL))

    def by_hand(q):
        h_BL, theta_L = oracle.preacts(q).detach(), q.t_L.detach().to(q.x_BI.dtype).exp()
        slope_BL = (h_BL > theta_L) + theta_L / eps * ((h_BL - theta_L).abs() < eps / 2)
        dh_BL = (upstream_BL.to(h_BL) * slope_BL).to(h_BL.dtype)
        return dh_BL.T @ q.x_BI, dh_BL.sum(0), dh_BL @ q.W_enc_LI

    for name, one, other, truth in zip(("W", "b", "x"), grads, by_hand(p.clone()), by_hand(p.double()), strict=True):
        within_budget(one, other, truth, dtype, name)


def test_pre_act_reaches_silent_latents(backend):
    h_BL = torch.full((3, 4), -2.0, device=backend.device, requires_grad=True)
    ones_L = torch.ones(4, device=backend.device)
    loss = backend.ops.pre_act(h_BL, torch.zeros(4, device=backend.device), ones_L, ones_L)
    assert loss.item() == pytest.approx(12.0)
    loss.backward()
    assert torch.equal(h_BL.grad, torch.full((3, 4), -1 / 3, device=backend.device))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"eps": 0.0}, "eps is 0.0; must be positive"),
        ({"ste": "other"}, "ste is 'other'; must be 'anthropic' or 'gdm'"),
    ],
)
def test_errors(backend, kwargs, message):
    h_BL, ones_L = torch.ones(2, 4, device=backend.device), torch.ones(4, device=backend.device)
    with pytest.raises(ValueError, match=message):
        backend.ops.jumprelu(h_BL, ones_L, **{"eps": 2.0, "ste": "gdm"} | kwargs)
    with pytest.raises(ValueError, match=r"c is -1\.0; must be positive"):
        backend.ops.weighted_tanh(DenseLatents(h_BL), ones_L, ones_L, -1.0)
    with pytest.raises(ValueError, match=r"t_L has shape \(3,\); must be \(4,\)"):
        backend.ops.jumprelu(h_BL, ones_L[:3], 2.0, "gdm")


@pytest.mark.parametrize("ste", ["anthropic", "gdm"])
@pytest.mark.parametrize("scale", [0.3, 3.0], ids=["window-dense", "window-sparse"])
def test_encode_jumprelu_and_its_penalties(backend, ste, scale, make_problem, oracle, within_budget):
    p = make_problem(65, 24, 130, 9, device=backend.device, segments=(4, 5))
    with torch.no_grad():
        p.b_enc_L.sub_(math.log(scale + 1))
    eps, c = 1.5 / scale, 4.0
    ops = backend.ops
    latents = ops.encode_jumprelu(p.x_BI, p.W_enc_LI, p.b_enc_L, p.t_L, eps, ste)
    n_L = ops.decoder_norms(p.W_dec_LO, p.segments, "sum").n_L
    tanh = ops.weighted_tanh(latents, n_L, p.lambda_L, c)
    pre_act = ops.pre_act_penalty(latents, p.t_L, n_L, p.lambda_L)
    y_BO = ops.sparse_decode(latents, p.W_dec_LO, p.b_dec_O)
    loss = ops.recon_loss(y_BO, p.target_BO, p.segments).loss + tanh + pre_act
    loss.backward()

    def by_hand(q):
        h_BL = oracle.preacts(q)
        lambda_L = q.lambda_L
        a_BL = torch.where(h_BL > q.t_L.exp(), h_BL, 0).detach().requires_grad_()
        n_L = oracle.norms(q.W_dec_LO, q.segments, "sum")
        recon = oracle.recon(oracle.decode(a_BL, q), q)
        tanh = ((c * a_BL * n_L).tanh() * lambda_L).sum() / 65
        pre = ((q.t_L.exp() - h_BL).clamp(min=0) * n_L * lambda_L).sum() / 65
        (recon + tanh).backward(retain_graph=True)
        dh_BL, dt_L = jumprelu_grads(h_BL.detach(), q.t_L.detach(), a_BL.grad, eps, ste)
        pre.backward(retain_graph=True)
        h_BL.backward(dh_BL)
        q.t_L.grad += dt_L
        return (recon + tanh + pre).detach()

    p64, eager = p.double(), p.clone()
    truth, other = by_hand(p64), by_hand(eager)
    within_budget(loss, other, truth, torch.float32, "loss")
    for name in p.leaves():
        within_budget(*[getattr(q, name).grad for q in (p, eager, p64)], torch.float32, name)


def test_encode_relu_matches_its_definition(backend, make_problem):
    p, q = make_problem(20, 8, 50, 6, device=backend.device), make_problem(20, 8, 50, 6, device=backend.device)
    y_BO = backend.ops.sparse_decode(backend.ops.encode_relu(p.x_BI, p.W_enc_LI, p.b_enc_L), p.W_dec_LO, p.b_dec_O)
    expected_BO = (q.x_BI @ q.W_enc_LI.T + q.b_enc_L).relu() @ q.W_dec_LO + q.b_dec_O
    torch.testing.assert_close(y_BO, expected_BO)
    y_BO.square().sum().backward()
    expected_BO.square().sum().backward()
    for name in ("x_BI", "W_enc_LI", "b_enc_L", "W_dec_LO", "b_dec_O"):
        torch.testing.assert_close(getattr(p, name).grad, getattr(q, name).grad, rtol=1e-4, atol=1e-4)
