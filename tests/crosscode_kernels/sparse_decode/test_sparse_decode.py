"""Decode: sums over active rows only, and its three gradients.

Axes: B tokens · O flattened output dims · L latents · N stored entries.
"""

from __future__ import annotations

import pytest
import torch
from crosscode_kernels import DenseLatents, SparseLatents


def sparse_pattern(B, L, k, zipf):
    """Token-sorted ragged entries; `zipf` makes few latents hot."""
    weights_L = 1 / (1 + torch.arange(L).float()) if zipf else torch.ones(L)
    kept_BL = torch.zeros(B, L, dtype=torch.bool)
    for b in range(B):
        n = min(L, max(0, k + b % 3 - 1))
        if n:
            kept_BL[b, torch.multinomial(weights_L, n)] = True
    return kept_BL


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (7, 63, 5, 4), (129, 40, 257, 8), (63, 1000, 7, 3)], ids=str)
@pytest.mark.parametrize("zipf", [False, True], ids=["uniform", "zipf"])
@pytest.mark.parametrize("form", ["sparse", "dense"])
def test_forward_and_gradients(backend, dtype, shape, zipf, form, make_problem, oracle, within_budget):
    B, L, O, k = shape  # noqa: E741
    p = make_problem(B, 2, L, O, dtype, backend.device)
    a_BL = (torch.rand(B, L) + 0.1).mul(sparse_pattern(B, L, k, zipf)).to(backend.device, dtype).requires_grad_()
    latents = SparseLatents.from_dense(a_BL) if form == "sparse" else DenseLatents(a_BL)
    y_BO = backend.ops.sparse_decode(latents, p.W_dec_LO, p.b_dec_O)

    p64, eager = p.double(), p.clone()
    a64_BL, a_eager_BL = (a_BL.detach().cpu().double().requires_grad_(), a_BL.detach().clone().requires_grad_())
    y64_BO, y_eager_BO = oracle.decode(a64_BL, p64), oracle.decode(a_eager_BL, eager)
    within_budget(y_BO, y_eager_BO, y64_BO, dtype, "y")

    dy_BO = torch.randn(B, O).to(dtype)
    y_BO.backward(dy_BO.to(backend.device))
    y64_BO.backward(dy_BO.double())
    y_eager_BO.backward(dy_BO.to(backend.device))
    for name in ("W_dec_LO", "b_dec_O"):
        within_budget(*[getattr(q, name).grad for q in (p, eager, p64)], dtype, name)
    support_BL = (a_BL != 0).detach().cpu() if form == "sparse" else torch.ones(B, L, dtype=torch.bool)
    grads = [a.grad.cpu() * support_BL for a in (a_BL, a_eager_BL, a64_BL)]
    within_budget(*grads, dtype, "latents")


def test_stored_zeros_receive_the_gradient_of_their_value(backend, make_problem):
    p = make_problem(2, 2, 4, 3, device=backend.device)
    value_N = torch.tensor([1.0, 0.0, 0.0, 2.0], device=backend.device, requires_grad=True)
    row_ptr_B1 = torch.tensor([0, 2, 4], dtype=torch.int32, device=backend.device)
    latent_idx_N = torch.tensor([3, 0, 1, 2], dtype=torch.int32, device=backend.device)
    backend.ops.sparse_decode(SparseLatents(row_ptr_B1, latent_idx_N, value_N, 4), p.W_dec_LO, None).sum().backward()
    torch.testing.assert_close(value_N.grad, p.W_dec_LO.detach().sum(1)[[3, 0, 1, 2]])
    assert p.W_dec_LO.grad is not None
    assert p.W_dec_LO.grad[[0, 1]].count_nonzero() == 0


@pytest.mark.parametrize("layout", ["expanded", "transposed", "strided"])
def test_gradients_of_any_layout(backend, layout, make_problem):
    p = make_problem(6, 4, 20, 6, device=backend.device)
    latents = backend.ops.encode_topk(p.x_BI, p.W_enc_LI, p.b_enc_L, 3)
    y_BO = backend.ops.sparse_decode(latents, p.W_dec_LO, p.b_dec_O)
    dy_BO = {
        "expanded": torch.ones(1, 1).expand(6, 6),
        "transposed": torch.randn(6, 6).t(),
        "strided": torch.randn(6, 12)[:, ::2],
    }[layout].to(backend.device)
    got = torch.autograd.grad(y_BO, list(p.leaves().values())[:5], dy_BO, retain_graph=True, allow_unused=True)
    expected = torch.autograd.grad(y_BO, list(p.leaves().values())[:5], dy_BO.contiguous(), allow_unused=True)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_frozen_decoder_still_passes_gradients_to_the_encoder(backend, make_problem):
    p = make_problem(6, 4, 20, 6, device=backend.device)
    latents = backend.ops.encode_topk(p.x_BI, p.W_enc_LI, p.b_enc_L, 3)
    backend.ops.sparse_decode(latents, p.W_dec_LO.detach(), None).sum().backward()
    assert p.W_enc_LI.grad is not None and p.W_enc_LI.grad.any()


def test_a_frozen_encoder_leaves_the_decoder_trainable(backend, make_problem):
    p = make_problem(6, 4, 20, 6, device=backend.device)
    latents = backend.ops.encode_topk(p.x_BI.detach(), p.W_enc_LI.detach(), p.b_enc_L.detach(), 3)
    backend.ops.sparse_decode(latents, p.W_dec_LO, p.b_dec_O).sum().backward()
    expected_LO = latents.to_dense().detach().sum(0).unsqueeze(1).expand_as(p.W_dec_LO)
    torch.testing.assert_close(p.W_dec_LO.grad, expected_LO)


@pytest.mark.parametrize(
    ("W_shape", "b_shape", "message"),
    [((7, 3), (3,), "latents are over 20 and W_dec_LO has 7 rows"), ((20, 3), (4,), r"b_dec_O has shape \(4,\)")],
)
def test_errors(backend, W_shape, b_shape, message, make_problem):
    p = make_problem(6, 4, 20, 6, device=backend.device)
    latents = backend.ops.encode_topk(p.x_BI, p.W_enc_LI, p.b_enc_L, 3)
    with pytest.raises(ValueError, match=message):
        backend.ops.sparse_decode(
            latents, torch.ones(W_shape, device=backend.device), torch.ones(b_shape, device=backend.device)
        )


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_indices_made_by_hand(backend, index_dtype, make_problem):
    p = make_problem(2, 2, 4, 3, device=backend.device)
    row_ptr_B1 = torch.tensor([0, 2, 4], dtype=index_dtype, device=backend.device)
    latent_idx_N = torch.tensor([3, 0, 1, 2], dtype=index_dtype, device=backend.device)
    value_N = torch.tensor([1.0, 0.5, 2.0, 2.0], device=backend.device, requires_grad=True)
    latents, ops = SparseLatents(row_ptr_B1, latent_idx_N, value_N, 4), backend.ops
    dense = DenseLatents(latents.to_dense().detach().requires_grad_())
    n_L = torch.rand(4, device=backend.device, requires_grad=True)
    losses = []
    for form in (latents, dense):
        y_BO = ops.sparse_decode(form, p.W_dec_LO, p.b_dec_O)
        recon = ops.decode_recon_loss(form, p.W_dec_LO, p.b_dec_O, p.target_BO, (3,)).loss
        penalty = ops.weighted_l1(form, n_L, p.lambda_L) + ops.weighted_tanh(form, n_L, p.lambda_L, 2.0)
        losses.append(y_BO.sum() + recon + penalty)
        losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1])
    dense_grad_N = dense.value_BL.grad[latents.token_idx_N(), latent_idx_N.long()]
    torch.testing.assert_close(value_N.grad, dense_grad_N)


def test_an_input_without_width_still_trains_the_bias(backend, make_problem):
    p = make_problem(4, 0, 8, 5, device=backend.device)
    latents = backend.ops.encode_topk(p.x_BI, p.W_enc_LI, p.b_enc_L, 2)
    latents.to_dense().sum().backward()
    assert p.W_enc_LI.grad.shape == (8, 0)
    assert p.b_enc_L.grad.sum() == 4 * min(2, int((p.b_enc_L > 0).sum()))
