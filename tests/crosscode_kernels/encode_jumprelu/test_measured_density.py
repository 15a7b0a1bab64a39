"""The switch between dense, mixed and sparse products, and that none of them changes a gradient.

Axes: B tokens · L latents.
"""

from __future__ import annotations

import logging

import pytest
import torch
from crosscode_kernels import Backend, DenseLatents, OpSet, SparseLatents, resolve_backend
from crosscode_kernels.encode_jumprelu.support import few_positive

MODES = {"dense": 0.0, "mixed": 0.35, "sparse": 1.1}


def step(ops, p, ste, activation="jumprelu", pre_act=True):
    n_L = ops.decoder_norms(p.W_dec_LO, p.segments, "sum").n_L
    encoder = (p.x_BI, p.W_enc_LI, p.b_enc_L)
    if activation == "relu":
        latents = ops.encode_relu(*encoder)
        penalty = ops.weighted_l1(latents, n_L, p.lambda_L)
    else:
        latents = ops.encode_jumprelu(*encoder, p.t_L, 2.0, ste)
        penalty = ops.weighted_tanh(latents, n_L, p.lambda_L, 4.0)
        if pre_act:
            penalty = penalty + ops.pre_act_penalty(latents, p.t_L, n_L, 0.1 * p.lambda_L)
    y_BO = ops.sparse_decode(latents, p.W_dec_LO, p.b_dec_O)
    loss = ops.recon_loss(y_BO, p.target_BO, p.segments).loss + penalty
    loss.backward()
    return loss.detach(), latents


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ste", ["anthropic", "gdm"])
@pytest.mark.parametrize("pre_act", [True, False])
def test_every_mode_gives_the_gradients_of_the_reference(mode, ste, pre_act, make_problem):
    p, q = (make_problem(33, 12, 70, 9, segments=(4, 5)) for _ in range(2))
    loss, latents = step(OpSet(Backend("torch", sparse_below=MODES[mode])), p, ste, pre_act=pre_act)
    expected, _ = step(resolve_backend("reference", "cpu"), q, ste, pre_act=pre_act)
    is_expected = {
        "dense": isinstance(latents, DenseLatents) and latents.active is None,
        "mixed": isinstance(latents, DenseLatents) and latents.active is not None,
        "sparse": isinstance(latents, SparseLatents),
    }
    assert is_expected[mode]
    torch.testing.assert_close(loss, expected)
    for name in p.leaves():
        torch.testing.assert_close(getattr(p, name).grad, getattr(q, name).grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("through", ["l0_B", "firing_L"])
def test_every_mode_counts_steps_as_the_reference(mode, through, make_problem):
    grads = []
    for ops in (OpSet(Backend("torch", sparse_below=MODES[mode])), resolve_backend("reference", "cpu")):
        p = make_problem(33, 12, 70, 9)
        latents = ops.encode_jumprelu(p.x_BI, p.W_enc_LI, p.b_enc_L, p.t_L, 2.0, "gdm")
        found = ops.step_l0(latents, p.t_L, 2.0)
        assert torch.equal(found.l0_B, latents.l0_B().float()) and torch.equal(
            found.firing_L, latents.firing_counts_L().float()
        )
        counts = getattr(found, through)
        (counts * torch.arange(counts.shape[0])).sum().backward()
        assert p.W_enc_LI.grad is None and (p.t_L.grad < 0).any()
        grads.append(p.t_L.grad)
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_relu_in_both_modes(mode, make_problem):
    p, q = (make_problem(33, 12, 70, 9) for _ in range(2))
    loss, latents = step(OpSet(Backend("torch", sparse_below=MODES[mode])), p, "gdm", "relu")
    expected, _ = step(resolve_backend("reference", "cpu"), q, "gdm", "relu")
    assert isinstance(latents, SparseLatents if mode == "sparse" else DenseLatents)
    torch.testing.assert_close(loss, expected)
    for name in set(p.leaves()) - {"t_L"}:
        torch.testing.assert_close(getattr(p, name).grad, getattr(q, name).grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("mode", MODES)
def test_latents_on_their_threshold_are_neither_active_nor_silent(mode):
    ops = OpSet(Backend("torch", sparse_below=MODES[mode]))
    # theta = 1 exactly; pre-activations -1, 1 and 3 below, on and above it.
    x_BI, W_LI = torch.eye(3), torch.tensor([[-1.0, 1.0, 3.0]]).requires_grad_()
    t_L = torch.zeros(1, requires_grad=True)
    latents = ops.encode_jumprelu(x_BI, W_LI, None, t_L, 1.0, "anthropic")
    assert latents.to_dense().view(-1).tolist() == [0, 0, 3]
    ones_L = torch.ones(1)
    (3 * ops.pre_act_penalty(latents, t_L, ones_L, ones_L)).backward()
    assert W_LI.grad.tolist() == [[-1, 0, 0]]
    assert t_L.grad.item() == pytest.approx(1)


@pytest.mark.parametrize("mode", MODES)
def test_nan_is_seen_in_every_mode(mode):
    x_BI = torch.zeros(4, 2)
    x_BI[2, 1] = float("nan")
    ops = OpSet(Backend("torch", sparse_below=MODES[mode]))
    t_L = torch.zeros(6)
    latents = ops.encode_jumprelu(x_BI, torch.ones(6, 2), None, t_L, 1.0, "anthropic")
    assert latents.to_dense()[2].isnan().all()
    assert ops.encode_relu(x_BI, torch.ones(6, 2), None).to_dense()[2].isnan().all()


def test_a_switch_is_logged_once(caplog, make_problem):
    ops = OpSet(Backend("torch"))
    p = make_problem(40, 12, 70, 9)
    b_silent_L = p.b_enc_L.detach() - 100
    with caplog.at_level(logging.INFO, logger="crosscode_kernels"):
        for bias_L in (p.b_enc_L, p.b_enc_L, b_silent_L, b_silent_L):
            ops.encode_relu(p.x_BI, p.W_enc_LI, bias_L)
    messages = [record.getMessage() for record in caplog.records]
    assert [message.rsplit(": ", 1)[1] for message in messages] == ["dense", "sparse"]


def test_a_penalty_needs_latents_of_the_right_encoder(backend, make_problem):
    p = make_problem(5, 4, 20, 3, device=backend.device)
    latents = backend.ops.encode_topk(p.x_BI, p.W_enc_LI, p.b_enc_L, 2)
    with pytest.raises(ValueError, match="latents carry no pre-activations; must come from encode_jumprelu"):
        backend.ops.pre_act_penalty(latents, p.t_L, p.lambda_L, p.lambda_L)


def test_a_silent_batch_still_revives(backend):
    x_BI = torch.ones(4, 2, device=backend.device)
    W_LI = torch.full((8, 2), -3.0, device=backend.device, requires_grad=True)
    t_L = torch.zeros(8, device=backend.device)
    ones_L = torch.ones(8, device=backend.device)
    latents = backend.ops.encode_jumprelu(x_BI, W_LI, None, t_L, 1.0, "anthropic")
    loss = backend.ops.pre_act_penalty(latents, t_L, ones_L, ones_L)
    loss.backward()
    assert loss.item() == pytest.approx(8 * 7)
    torch.testing.assert_close(W_LI.grad, -torch.ones(8, 2, device=backend.device))


def test_an_empty_batch(backend):
    t_L = torch.zeros(8, device=backend.device, requires_grad=True)
    W_LI = torch.ones(8, 2, device=backend.device, requires_grad=True)
    latents = backend.ops.encode_jumprelu(torch.ones(0, 2, device=backend.device), W_LI, None, t_L, 1.0, "gdm")
    assert latents.to_dense().shape == (0, 8)
    backend.ops.pre_act_penalty(latents, t_L, t_L.detach(), t_L.detach()).backward()


@pytest.mark.parametrize("n_latents", [40, 48, 1000])
@pytest.mark.parametrize("n_positive", [0, 1, 9])
def test_few_positive_latents_are_found_in_order_of_tokens(n_latents, n_positive):
    generator = torch.Generator().manual_seed(0)
    h_BL = -torch.rand(30, n_latents, generator=generator)
    h_BL.view(-1)[torch.randperm(h_BL.numel(), generator=generator)[:n_positive]] = 1
    h_BL[3, 5], h_BL[4, 5] = torch.nan, 0
    flat_N = few_positive(h_BL)
    assert torch.equal(flat_N.sort().values, (~(h_BL <= 0)).view(-1).nonzero().squeeze(1))
    assert (flat_N // n_latents).diff().ge(0).all()


@pytest.mark.parametrize("h_BL", [torch.ones(4, 48), -torch.ones(4, 49), torch.ones(4, 0), torch.ones(2, 5)])
def test_many_positive_latents_and_odd_widths_are_left_to_another_way(h_BL):
    assert few_positive(h_BL) is None
