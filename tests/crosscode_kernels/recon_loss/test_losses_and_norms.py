"""Reconstruction loss, decoder norms and the norm-weighted penalties.

Axes: B tokens · O flattened output dims · L latents · X crosscoding positions.
"""

from __future__ import annotations

import pytest
import torch
from crosscode_kernels import DenseLatents, SparseLatents

RAGGED = [(1,), (3, 4), (1, 60, 2), (128, 129)]


@pytest.mark.parametrize("segments", RAGGED, ids=str)
@pytest.mark.parametrize("B", [1, 7, 130])
def test_recon_loss(backend, dtype, segments, B, within_budget):
    O = sum(segments)  # noqa: E741
    y_BO = torch.randn(B, O).to(backend.device, dtype).requires_grad_()
    target_BO = torch.randn(B, O).to(backend.device, dtype).requires_grad_()
    loss, per_x_X, _ = backend.ops.recon_loss(y_BO, target_BO, segments)
    weight_X = torch.rand(len(segments))
    (0.5 * loss + (per_x_X * weight_X.to(backend.device)).sum()).backward()

    def by_hand(dtype):
        error_BO = y_BO.detach().cpu().to(dtype) - target_BO.detach().cpu().to(dtype)
        ids_O = torch.arange(len(segments)).repeat_interleave(torch.tensor(segments))
        squares_BO = error_BO.to(torch.float32 if dtype != torch.float64 else dtype) ** 2
        per_x_X = torch.stack([squares_BO[:, ids_O == x].sum() for x in range(len(segments))]) / B
        dy_BO = 2 * error_BO / B * (0.5 + weight_X.to(dtype))[ids_O]
        return per_x_X.sum(), per_x_X, dy_BO

    truth, eager = by_hand(torch.float64), by_hand(dtype)
    within_budget(loss, eager[0], truth[0], dtype, "loss")
    within_budget(per_x_X, eager[1], truth[1], dtype, "per_x")
    within_budget(y_BO.grad, eager[2], truth[2], dtype, "dy")
    within_budget(target_BO.grad, -eager[2], -truth[2], dtype, "dtarget")
    assert loss.dtype == per_x_X.dtype == torch.float32


def test_recon_loss_of_an_empty_batch_is_zero(backend):
    y_BO = torch.zeros(0, 6, device=backend.device, requires_grad=True)
    loss, per_x_X, _ = backend.ops.recon_loss(y_BO, torch.zeros(0, 6, device=backend.device), (2, 4))
    assert loss.item() == 0
    assert per_x_X.tolist() == [0, 0]
    loss.backward()
    assert y_BO.grad.shape == (0, 6)


def test_recon_loss_passes_nan_on(backend):
    y_BO = torch.ones(3, 4, device=backend.device)
    y_BO[1, 3] = float("nan")
    loss, per_x_X, _ = backend.ops.recon_loss(y_BO, torch.zeros(3, 4, device=backend.device), (2, 2))
    assert loss.isnan()
    assert per_x_X[0].item() == pytest.approx(2)
    assert per_x_X[1].isnan()


@pytest.mark.parametrize("segments", RAGGED, ids=str)
@pytest.mark.parametrize("mode", ["sum", "joint"])
def test_decoder_norms(backend, dtype, segments, mode, within_budget):
    L, O = 37, sum(segments)  # noqa: E741
    W_LO = torch.randn(L, O).to(backend.device, dtype)
    W_LO[5] = 0
    W_LO[6, : segments[0]] = 0
    W_LO.requires_grad_()
    norms_LX, n_L = backend.ops.decoder_norms(W_LO, segments, mode)
    up_LX, up_L = torch.randn(L, len(segments)), torch.randn(L)
    torch.autograd.backward([norms_LX, n_L], [up_LX.to(norms_LX), up_L.to(n_L)])

    def by_hand(dtype):
        W = W_LO.detach().cpu().to(dtype)
        ids_O = torch.arange(len(segments)).repeat_interleave(torch.tensor(segments))
        norms = torch.stack([W[:, ids_O == x].square().sum(1).sqrt() for x in range(len(segments))], 1)
        n = norms.sum(1) if mode == "sum" else W.square().sum(1).sqrt()
        safe = norms.masked_fill(norms == 0, float("inf"))
        dW = W * (up_LX.to(dtype) / safe)[:, ids_O]
        if mode == "sum":
            dW = dW + W * (up_L.to(dtype).unsqueeze(1) / safe)[:, ids_O]
        else:
            dW = dW + W * (up_L.to(dtype) / n.masked_fill(n == 0, float("inf"))).unsqueeze(1)
        return norms, n, dW

    truth, eager = by_hand(torch.float64), by_hand(torch.float32)
    within_budget(norms_LX, eager[0], truth[0], torch.float32, "norms")
    within_budget(n_L, eager[1], truth[1], torch.float32, "n")
    within_budget(W_LO.grad, eager[2], truth[2], dtype, "dW")
    assert W_LO.grad[5].count_nonzero() == 0


@pytest.mark.parametrize(
    ("segments", "mode", "message"),
    [
        ((2, 3), "sum", r"segments are \[2, 3\]; must be positive and sum to the width of W_dec_LO, 6"),
        ((6, 0), "sum", "must be positive"),
        ((6,), "mean", "mode is 'mean'; must be 'sum' or 'joint'"),
    ],
)
def test_decoder_norm_errors(backend, segments, mode, message):
    with pytest.raises(ValueError, match=message):
        backend.ops.decoder_norms(torch.ones(4, 6, device=backend.device), segments, mode)


@pytest.mark.parametrize("shape", [(1, 1), (7, 63), (130, 257), (0, 4)], ids=str)
@pytest.mark.parametrize("form", ["dense", "sparse"])
@pytest.mark.parametrize("penalty", ["l1", "tanh"])
def test_weighted_penalties(backend, dtype, shape, form, penalty, within_budget):
    B, L = shape
    c, g = 4.0, 1.7
    a_BL = (torch.rand(B, L) * (torch.rand(B, L) < 0.3)).to(backend.device, dtype).requires_grad_()
    n_L = (torch.rand(L) + 0.2).to(backend.device).requires_grad_()
    lambda_L = torch.rand(L).to(backend.device).requires_grad_()
    latents = DenseLatents(a_BL) if form == "dense" else SparseLatents.from_dense(a_BL)
    extra = () if penalty == "l1" else (c,)
    loss = getattr(backend.ops, f"weighted_{penalty}")(latents, n_L, lambda_L, *extra)
    (g * loss).backward()

    def by_hand(dtype):
        a, n, lam = (tensor.detach().cpu().to(dtype) for tensor in (a_BL, n_L, lambda_L))
        value, slope = (
            (a * n, torch.ones_like(a))
            if penalty == "l1"
            else (
                (c * a * n).tanh(),
                c * (1 - (c * a * n).tanh() ** 2),
            )
        )
        scale = g / max(B, 1)
        return (lam * value).sum() / max(B, 1), scale * lam * slope * n, (scale * lam * slope * a).sum(0)

    truth, eager = by_hand(torch.float64), by_hand(torch.float32)
    within_budget(loss, eager[0], truth[0], torch.float32, "loss")
    stored_BL = (a_BL != 0).detach().cpu() if form == "sparse" else torch.ones(B, L, dtype=torch.bool)
    grads = [a_BL.grad.cpu() * stored_BL, eager[1] * stored_BL, truth[1] * stored_BL]
    within_budget(*grads, dtype, "latents")
    within_budget(n_L.grad, eager[2], truth[2], torch.float32, "n")
    assert lambda_L.grad is None


def test_penalty_of_shared_and_exclusive_latents_is_one_call(backend):
    a_BL = torch.ones(2, 4, device=backend.device)
    n_L = torch.ones(4, device=backend.device)
    lambda_L = torch.tensor([0.1, 0.1, 1.0, 1.0], device=backend.device)
    assert backend.ops.weighted_l1(DenseLatents(a_BL), n_L, lambda_L).item() == pytest.approx(2.2)
