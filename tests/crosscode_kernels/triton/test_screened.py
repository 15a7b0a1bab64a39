"""Screened encode of the Triton backend: the selection is that of the float32 products, whatever the proof leaves to do.

Axes: B tokens · I flattened input dims · L latents.
"""

from __future__ import annotations

import pytest
import torch
from crosscode_kernels import Backend, OpSet
from crosscode_kernels.encode_topk import triton_screened

K = 4
SCREENED = OpSet(Backend("triton", ("screened",)))


def problem(B, I, L, seed, scale=1.0):  # noqa: E741
    generator = torch.Generator().manual_seed(seed)
    x_BI = scale * torch.randn(B, I, generator=generator)
    W_LI = torch.randn(L, I, generator=generator) * I**-0.5
    return x_BI, W_LI, torch.randn(L, generator=generator)


@pytest.fixture
def redone(monkeypatch):
    """How many rows were done again in each call."""
    counts = []
    redo = triton_screened.topk_of_tokens

    def spy(encoder, tokens_C, n_tokens, k):
        counts.append(int(n_tokens))
        return redo(encoder, tokens_C, n_tokens, k)

    monkeypatch.setattr(triton_screened, "topk_of_tokens", spy)
    return counts


def check(x_BI, W_LI, b_L, k=K):
    """Against float64: the same latents, values to rounding."""
    fast = SCREENED.encode_topk(x_BI, W_LI, b_L, k)
    a_BL = x_BI.double() @ W_LI.double().T
    a_BL = (a_BL if b_L is None else a_BL + b_L.double()).relu()
    idx_BK = a_BL.sort(dim=1, descending=True, stable=True).indices[:, :k]
    expected_BL = torch.zeros_like(a_BL).scatter(1, idx_BK, a_BL.gather(1, idx_BK))
    assert torch.equal(fast.to_dense() > 0, expected_BL > 0)
    torch.testing.assert_close(fast.to_dense().double(), expected_BL, rtol=1e-5, atol=1e-5 * float(a_BL.max()))
    return fast


@pytest.mark.parametrize(("B", "I", "L", "scale"), [(1, 1, 301, 1.0), (3, 33, 513, 1e-3), (4, 70, 403, 30.0)])
def test_the_selection_is_that_of_float32(B, I, L, scale, redone):  # noqa: E741
    x_BI, W_LI, b_L = problem(B, I, L, B + L, scale)
    check(x_BI, W_LI, b_L * scale if B > 1 else None)
    assert len(redone) == 1 and redone[0] < max(B, 2)


def test_rows_that_cannot_be_proven_are_done_again(redone):
    x_BI, W_LI, _ = problem(5, 32, 400, 0)
    # Hundreds of latents within one bfloat16 step of each other in three rows: no screen can rank them.
    W_LI[:, 0] = 1 + 1e-3 * torch.rand(400)
    x_BI[1:4] = 0
    x_BI[1:4, 0] = 100
    check(x_BI, W_LI, torch.zeros(400))
    assert 3 <= redone[0] < 5


def test_rows_are_done_again_in_chunks(monkeypatch, redone):
    from crosscode_kernels.aux_topk import triton_impl as aux
    from crosscode_kernels.selection import triton_impl

    monkeypatch.setattr(aux, "_TOKENS_AT_ONCE", 3)
    monkeypatch.setattr(triton_impl, "preacts_at_a_time", lambda fixed, cut, unit=1: 256)
    x_BI, W_LI, b_L = problem(6, 32, 400, 0)
    W_LI[:, 0] = 1 + 1e-3 * torch.rand(400)
    x_BI[1:5] = 0
    x_BI[1:5, 0] = 100
    check(x_BI, W_LI, 1e-3 * b_L)
    assert redone[0] >= 4


def test_equal_values_keep_the_lowest_index():
    x_BI, W_LI = torch.ones(2, 1), torch.where(torch.arange(300) % 7 == 3, 2.0, 1.0).unsqueeze(1)
    fast = SCREENED.encode_topk(x_BI, W_LI, None, K)
    assert fast.latent_idx_N.view(2, K).tolist() == [[3, 10, 17, 24]] * 2


@pytest.mark.parametrize("where", ["x", "W", "b"])
@pytest.mark.parametrize("value", [float("nan"), 1e38])
def test_values_that_are_not_finite_or_overflow(where, value):
    x_BI, W_LI, b_L = problem(2, 16, 300, 1)
    {"x": x_BI, "W": W_LI, "b": b_L}[where].view(-1)[5] = value
    dense_BL = OpSet(Backend("triton")).encode_topk(x_BI, W_LI, b_L, K).to_dense()
    fast_BL = SCREENED.encode_topk(x_BI, W_LI, b_L, K).to_dense()
    assert torch.equal(fast_BL.isnan(), dense_BL.isnan())
    finite_BL = dense_BL.isfinite()
    torch.testing.assert_close(fast_BL[finite_BL], dense_BL[finite_BL], rtol=1e-5, atol=1e-5)


def test_few_positive_latents_and_none():
    x_BI, W_LI, _ = problem(3, 16, 410, 2)
    b_L = torch.full((410,), -50.0)
    b_L[[7, 400]] = 20
    assert check(x_BI, W_LI, b_L).l0_B().tolist() == [2] * 3
    assert SCREENED.encode_topk(x_BI[:0], W_LI, b_L, K).to_dense().shape == (0, 410)


def test_gradients_are_those_of_the_dense_encode():
    grads = []
    for ops in (OpSet(Backend("triton")), SCREENED):
        x_BI, W_LI, b_L = (tensor.requires_grad_() for tensor in problem(2, 24, 300, 4))
        ops.encode_topk(x_BI, W_LI, b_L, K).to_dense().square().sum().backward()
        grads.append((x_BI.grad, W_LI.grad, b_L.grad))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_what_is_not_served_is_refused():
    from crosscode_kernels import resolve_backend

    with pytest.raises(ValueError, match="screened encoding is for float32"):
        resolve_backend("triton:screened", "cpu", torch.bfloat16)


def test_the_setting_of_sums_is_given_back():
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    with triton_screened._sums_in_float32():
        assert not matmul.allow_bf16_reduced_precision_reduction
    assert matmul.allow_bf16_reduced_precision_reduction == before
