"""A whole step through the op set, against the float64 oracle on the same support, within the error budget.

Axes: B tokens · I flattened input dims · O flattened output dims · L latents.
"""

from __future__ import annotations

import pytest
import torch
from crosscode_kernels import DenseLatents, SparseLatents, resolve_backend

SHAPES = [(1, 1, 1, 1, 1), (7, 63, 7, 257, 3), (3, 7, 257, 63, 7), (2, 1000, 63, 1000, 4)]
LEAVES = ("x_BI", "W_enc_LI", "b_enc_L", "W_dec_LO", "b_dec_O")


@pytest.fixture
def ops():
    return resolve_backend("triton", "cpu")


def split(O):  # noqa: E741
    return (O,) if O < 3 else (O - O // 3, O // 3)


def oracle_loss(oracle, p, kept_BL, joint):
    a_BL = oracle.latents(p, kept_BL)
    y_BO = oracle.decode(a_BL, p)
    wide = torch.float64 if y_BO.dtype == torch.float64 else torch.float32
    n_L = oracle.norms(p.W_dec_LO, p.segments, "joint" if joint else "sum")
    weighted_BL = a_BL.to(wide) * n_L
    l1 = (weighted_BL * p.lambda_L).sum(1).mean()
    tanh = (torch.tanh(4 * weighted_BL) * p.lambda_L).sum(1).mean()
    return a_BL, y_BO, oracle.recon(y_BO, p) + l1 + tanh


def triton_loss(ops, encoder, p, k, joint):
    latents = getattr(ops, encoder)(p.x_BI, p.W_enc_LI, p.b_enc_L, k)
    y_BO = ops.sparse_decode(latents, p.W_dec_LO, p.b_dec_O)
    n_L = ops.decoder_norms(p.W_dec_LO, p.segments, "joint" if joint else "sum").n_L
    recon = ops.recon_loss(y_BO, p.target_BO, p.segments)
    l1 = ops.weighted_l1(latents, n_L, p.lambda_L)
    return latents, y_BO, recon.loss + l1 + ops.weighted_tanh(latents, n_L, p.lambda_L, 4.0)


def check_step(ops, encoder, shape, dtype, make_problem, oracle, within_budget):
    B, I, L, O, k = shape  # noqa: E741
    joint = B % 2 == 0
    p = make_problem(B, I, L, O, dtype, zipf=True, segments=split(O))
    latents, y_BO, loss = triton_loss(ops, encoder, p, k, joint)
    kept_BL = (latents.to_dense() > 0).detach()
    assert int(kept_BL.sum()) <= B * k

    p64, eager = p.double(), p.clone()
    a64_BL, y64_BO, loss64 = oracle_loss(oracle, p64, kept_BL, joint)
    a_eager_BL, y_eager_BO, loss_eager = oracle_loss(oracle, eager, kept_BL, joint)
    within_budget(latents.to_dense(), a_eager_BL, a64_BL, dtype, "latents")
    within_budget(y_BO, y_eager_BO, y64_BO, dtype, "y")
    within_budget(loss, loss_eager, loss64, dtype, "loss")
    for value in (loss, loss_eager, loss64):
        value.backward()
    for name in LEAVES:
        within_budget(*[getattr(q, name).grad for q in (p, eager, p64)], dtype, f"gradient of {name}")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_topk_step(ops, shape, dtype, make_problem, oracle, within_budget):
    check_step(ops, "encode_topk", shape, dtype, make_problem, oracle, within_budget)


@pytest.mark.parametrize("encoder", ["encode_batch_topk", "encode_groupmax"])
def test_other_selections(ops, encoder, dtype, make_problem, oracle, within_budget):
    check_step(ops, encoder, (7, 63, 24, 40, 3), dtype, make_problem, oracle, within_budget)


def test_a_latent_that_is_active_everywhere(ops, dtype, make_problem, oracle, within_budget):
    # 70 entries of one latent: more than an item of the segment sums holds.
    B = 70
    p = make_problem(B, 5, 3, 9, dtype)
    with torch.no_grad():
        p.b_enc_L[1] = 20
    latents, _, loss = triton_loss(ops, "encode_topk", p, 1, False)
    assert latents.firing_counts_L().tolist() == [0, B, 0]
    p64, eager = p.double(), p.clone()
    kept_BL = (latents.to_dense() > 0).detach()
    for q in (p64, eager):
        oracle_loss(oracle, q, kept_BL, False)[-1].backward()
    loss.backward()
    for name in LEAVES:
        within_budget(*[getattr(q, name).grad for q in (p, eager, p64)], dtype, name)


def test_dense_latents_have_the_same_penalties_as_sparse_ones(ops, make_problem):
    p = make_problem(5, 4, 40, 6)
    dense_BL = torch.relu(torch.randn(5, 40)).requires_grad_()
    n_L = (torch.rand(40) + 0.1).requires_grad_()
    results = []
    for form in (DenseLatents, SparseLatents.from_dense):
        dense_BL.grad = n_L.grad = None
        latents = form(dense_BL)
        loss = ops.weighted_l1(latents, n_L, p.lambda_L) + ops.weighted_tanh(latents, n_L, p.lambda_L, 3.0)
        loss.backward()
        results.append((loss.detach(), dense_BL.grad * (dense_BL > 0), n_L.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_the_fused_decode_gives_the_loss_of_its_parts(ops, make_problem, dtype):
    from crosscode_kernels.registration import kernel_of

    p = make_problem(6, 8, 30, 45, dtype, segments=(20, 20, 5))
    with torch.no_grad():
        latents = ops.encode_topk(p.x_BI, p.W_enc_LI, p.b_enc_L, 4)
        expected = ops.recon_loss(ops.sparse_decode(latents, p.W_dec_LO, p.b_dec_O), p.target_BO, p.segments)
        per_x_X, residual_BO = kernel_of("decode_recon", "triton")(
            latents.entries(None), p.W_dec_LO, p.b_dec_O, p.target_BO, [20, 20, 5]
        )
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(per_x_X, expected.per_x_X, rtol=tolerance, atol=0)
    assert residual_BO.dtype == dtype and residual_BO.shape == p.target_BO.shape
