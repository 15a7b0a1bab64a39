"""Decode and reconstruction loss in one op: the loss, its gradients, and the residual.

Axes: B tokens · O flattened output dims · L latents · X crosscoding positions.
"""

from __future__ import annotations

import pytest
import torch
from crosscode_kernels import DenseLatents, SparseLatents

WEIGHTS = ("W_dec_LO", "b_dec_O")


def random_latents_BL(B, L, k, device, dtype, zipf):
    """About k active latents a token; `zipf` makes few latents hot."""
    weights_L = 1 / (1 + torch.arange(L).float()) if zipf else torch.ones(L)
    a_BL = torch.zeros(B, L)
    for b in range(B):
        kept = torch.multinomial(weights_L, min(L, max(1, k + b % 3 - 1)))
        a_BL[b, kept] = torch.rand(len(kept)) + 0.1
    return a_BL.to(device, dtype).requires_grad_()


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (7, 63, 5, 4), (67, 40, 131, 5)], ids=str)
@pytest.mark.parametrize("zipf", [False, True], ids=["uniform", "zipf"])
@pytest.mark.parametrize("form", ["sparse", "dense"])
@pytest.mark.parametrize("weighs_positions", [False, True])
def test_loss_and_gradients(backend, dtype, shape, zipf, form, weighs_positions, make_problem, oracle, within_budget):
    B, L, O, k = shape  # noqa: E741
    segments = (O,) if O < 3 else (2, O - 2)
    p = make_problem(B, 2, L, O, dtype, backend.device, segments=segments)
    a_BL = random_latents_BL(B, L, k, backend.device, dtype, zipf)
    latents = SparseLatents.from_dense(a_BL) if form == "sparse" else DenseLatents(a_BL)
    got = backend.ops.decode_recon_loss(latents, p.W_dec_LO, p.b_dec_O, p.target_BO, segments)
    weight_X = torch.rand(len(segments)) if weighs_positions else torch.zeros(len(segments))
    total = 0.5 * got.loss
    if weighs_positions:
        total = total + (got.per_x_X * weight_X.to(backend.device)).sum()
    total.backward()

    def by_hand(p, a_BL):
        y_BO = oracle.decode(a_BL, p)
        wide = torch.float64 if y_BO.dtype == torch.float64 else torch.float32
        error_BO = y_BO - p.target_BO
        parts = error_BO.to(wide).pow(2).sum(0).div(B).split(list(segments))
        per_x_X = torch.stack([part.sum() for part in parts])
        (0.5 * per_x_X.sum() + (per_x_X * weight_X.to(per_x_X)).sum()).backward()
        return per_x_X, error_BO, a_BL, p

    truth = by_hand(p.double(), a_BL.detach().cpu().double().requires_grad_())
    eager = by_hand(p.clone(), a_BL.detach().clone().requires_grad_())
    within_budget(got.per_x_X, eager[0], truth[0], dtype, "per_x")
    within_budget(got.loss, eager[0].sum(), truth[0].sum(), dtype, "loss")
    within_budget(got.residual_BO, eager[1], truth[1], dtype, "residual")
    for name in WEIGHTS:
        grads = [getattr(q, name).grad for q in (p, eager[3], truth[3])]
        within_budget(*grads, dtype, name)
    support_BL = (a_BL != 0).detach().cpu() if form == "sparse" else torch.ones(B, L, dtype=torch.bool)
    grads = [a.grad.cpu() * support_BL for a in (a_BL, eager[2], truth[2])]
    within_budget(*grads, dtype, "latents")
    assert not got.residual_BO.requires_grad
    assert got.loss.dtype == got.per_x_X.dtype == torch.float32


@pytest.mark.parametrize("encoder", ["encode_topk", "encode_batch_topk"])
@pytest.mark.parametrize("target_needs_grad", [False, True])
@pytest.mark.parametrize(("B", "k"), [(0, 3), (1, 3), (40, 3), (5, 0), (5, 30)])
def test_equals_its_parts(backend, encoder, target_needs_grad, B, k, make_problem):
    p, q = (make_problem(B, 6, 30, 9, device=backend.device, segments=(4, 5)) for _ in range(2))
    ops = backend.ops
    targets = [r.target_BO.detach().requires_grad_(target_needs_grad) for r in (p, q)]
    latents = getattr(ops, encoder)(p.x_BI, p.W_enc_LI, p.b_enc_L, k)
    fused = ops.decode_recon_loss(latents, p.W_dec_LO, p.b_dec_O, targets[0], p.segments)
    y_BO = ops.sparse_decode(getattr(ops, encoder)(q.x_BI, q.W_enc_LI, q.b_enc_L, k), q.W_dec_LO, q.b_dec_O)
    apart = ops.recon_loss(y_BO, targets[1], q.segments)
    for loss in (fused, apart):
        (3 * loss.loss).backward()
    torch.testing.assert_close(tuple(fused), tuple(apart))
    torch.testing.assert_close(fused.residual_BO, (y_BO - targets[1]).detach())
    for name in ("x_BI", "W_enc_LI", "b_enc_L", "W_dec_LO", "b_dec_O"):
        torch.testing.assert_close(getattr(p, name).grad, getattr(q, name).grad)
    torch.testing.assert_close(targets[0].grad, targets[1].grad)


def test_a_target_of_any_layout(backend, make_problem):
    p = make_problem(8, 6, 30, 8, device=backend.device)
    latents = backend.ops.encode_topk(p.x_BI, p.W_enc_LI, p.b_enc_L, 3)
    wide = torch.randn(8, 16, device=backend.device)
    for target_BO in (p.target_BO.T, wide[:, ::2], wide[:1, :8].expand(8, 8)):
        got, expected = (
            backend.ops.decode_recon_loss(latents, p.W_dec_LO, p.b_dec_O, target, (8,))
            for target in (target_BO, target_BO.contiguous())
        )
        assert got.loss == expected.loss
        assert torch.equal(got.residual_BO, expected.residual_BO)


def test_nan_and_inf_pass_through(backend, make_problem):
    p = make_problem(4, 6, 30, 9, device=backend.device, segments=(4, 5))
    latents = backend.ops.encode_topk(p.x_BI, p.W_enc_LI, p.b_enc_L, 3)
    for value in (float("nan"), float("inf")):
        target_BO = p.target_BO.clone()
        target_BO[2, 1] = value
        got = backend.ops.decode_recon_loss(latents, p.W_dec_LO, p.b_dec_O, target_BO, p.segments)
        assert not got.loss.isfinite()
        assert not got.per_x_X[0].isfinite()
        assert got.per_x_X[1].isfinite()


def test_the_same_bits_twice(backend, make_problem):
    def run():
        p = make_problem(33, 6, 30, 9, device=backend.device, zipf=True, segments=(4, 5))
        latents = backend.ops.encode_topk(p.x_BI, p.W_enc_LI, p.b_enc_L, 4)
        loss = backend.ops.decode_recon_loss(latents, p.W_dec_LO, p.b_dec_O, p.target_BO, p.segments).loss
        loss.backward()
        return [loss, *(getattr(p, name).grad for name in ("W_enc_LI", "b_enc_L", *WEIGHTS))]

    assert all(torch.equal(one, other) for one, other in zip(run(), run(), strict=True))


def test_under_autocast(fast_backend, make_problem):
    p, q = (make_problem(16, 6, 30, 9, device=fast_backend.device) for _ in range(2))
    ops = fast_backend.ops
    with torch.autocast(fast_backend.device, torch.bfloat16):
        latents = ops.encode_topk(p.x_BI, p.W_enc_LI, p.b_enc_L, 3)
        fused = ops.decode_recon_loss(latents, p.W_dec_LO, p.b_dec_O, p.target_BO, (9,))
        y_BO = ops.sparse_decode(ops.encode_topk(q.x_BI, q.W_enc_LI, q.b_enc_L, 3), q.W_dec_LO, q.b_dec_O)
        apart = ops.recon_loss(y_BO, q.target_BO, (9,))
    fused.loss.backward()
    apart.loss.backward()
    rounding = 2**-8  # of what is reconstructed, which one kernel keeps in float32 until the target is subtracted
    torch.testing.assert_close(fused.loss, apart.loss, rtol=2 * rounding, atol=0)
    largest = q.W_dec_LO.grad.abs().max().item()
    torch.testing.assert_close(p.W_dec_LO.grad, q.W_dec_LO.grad, rtol=0, atol=2 * rounding * largest)


def test_compiled_in_one_graph(fast_backend, make_problem):
    p, q = (make_problem(16, 6, 30, 9, device=fast_backend.device, segments=(4, 5)) for _ in range(2))
    ops = fast_backend.ops

    def loss(p):
        latents = ops.encode_topk(p.x_BI, p.W_enc_LI, p.b_enc_L, 3)
        return ops.decode_recon_loss(latents, p.W_dec_LO, p.b_dec_O, p.target_BO, (4, 5)).loss

    eager, compiled = loss(p), torch.compile(loss, backend="aot_eager", fullgraph=True)(q)
    eager.backward()
    compiled.backward()
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(q.W_dec_LO.grad, p.W_dec_LO.grad)


def test_checks_the_target(fast_backend, make_problem):
    p = make_problem(4, 6, 30, 9, device=fast_backend.device)
    latents = fast_backend.ops.encode_topk(p.x_BI, p.W_enc_LI, p.b_enc_L, 3)
    with pytest.raises(ValueError, match=r"target_BO has shape \(4, 8\); must be \(4, 9\)"):
        fast_backend.ops.decode_recon_loss(latents, p.W_dec_LO, p.b_dec_O, p.target_BO[:, :8], (8,))
    with pytest.raises(
        ValueError, match=r"segments are \[4, 4\]; must be positive and sum to the width of target_BO, 9"
    ):
        fast_backend.ops.decode_recon_loss(latents, p.W_dec_LO, p.b_dec_O, p.target_BO, (4, 4))
    with pytest.raises(ValueError, match="must be of one dtype"):
        fast_backend.ops.decode_recon_loss(latents, p.W_dec_LO, p.b_dec_O, p.target_BO.double(), (9,))
