"""Screened encode: the bound holds, and the selection is that of the dense encode.

Axes: B tokens · I flattened input dims · L latents.
"""

from __future__ import annotations

import pytest
import torch
from crosscode_kernels import Backend, OpSet
from crosscode_kernels.encode_topk import screened
from crosscode_kernels.encoder import Encoder
from hypothesis import given, settings
from hypothesis import strategies as st

K = 4
DENSE, SCREENED = OpSet(Backend("torch")), OpSet(Backend("torch", ("screened",)))


def problem(B, I, L, seed, scale=1.0):  # noqa: E741
    generator = torch.Generator().manual_seed(seed)
    x_BI = scale * torch.randn(B, I, generator=generator)
    W_LI = torch.randn(L, I, generator=generator) * I**-0.5
    return x_BI, W_LI, torch.randn(L, generator=generator)


def dense_and_screened(x_BI, W_LI, b_L, k=K):
    dense = DENSE.encode_topk(x_BI, W_LI, b_L, k)
    return dense, SCREENED.encode_topk(x_BI, W_LI, b_L, k)


@given(
    st.integers(1, 20), st.integers(1, 70), st.integers(300, 700), st.integers(0, 99), st.sampled_from([1e-3, 1, 30])
)
@settings(max_examples=40, deadline=None)
def test_the_bound_holds_for_every_latent(B, I, L, seed, scale):  # noqa: E741
    x_BI, W_LI, b_L = problem(B, I, L, seed, scale)
    bound_BL, largest = screened.upper_bounds(Encoder(x_BI, W_LI, b_L))
    rounded_up_BL = screened.rounded_up(bound_BL).double()
    h_BL = x_BI.double() @ W_LI.double().T + b_L.double()
    assert (rounded_up_BL >= h_BL).all()
    assert largest >= W_LI.norm(dim=1).max() * 0.999


@given(st.integers(1, 20), st.integers(1, 70), st.integers(300, 700), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_the_selection_is_that_of_the_dense_encode(B, I, L, seed):  # noqa: E741
    x_BI, W_LI, b_L = problem(B, I, L, seed)
    dense, fast = dense_and_screened(x_BI, W_LI, b_L)
    torch.testing.assert_close(fast.to_dense(), dense.to_dense(), rtol=1e-5, atol=1e-5)
    assert torch.equal(fast.to_dense() > 0, dense.to_dense() > 0)


def test_rows_that_cannot_be_proven_are_done_densely(monkeypatch):
    x_BI, W_LI, _ = problem(8, 32, 600, 0)
    # Hundreds of latents within one bfloat16 step of each other in the first three rows: no screen can rank them.
    W_LI[:, 0] = 1 + 1e-5 * torch.rand(600)
    x_BI[:3] = 0
    x_BI[:3, 0] = 100
    rows = []
    dense_encode = screened.dense_encode_topk

    def spy(encoder, k):
        rows.append(encoder.x_BI.shape[0])
        return dense_encode(encoder, k)

    monkeypatch.setattr(screened, "dense_encode_topk", spy)
    dense, fast = dense_and_screened(x_BI, W_LI, torch.zeros(600))
    assert rows and 3 <= rows[0] < 8
    assert torch.equal(fast.to_dense()[:3], dense.to_dense()[:3])
    assert torch.equal(fast.to_dense() > 0, dense.to_dense() > 0)


def test_equal_values_keep_the_lowest_index():
    x_BI, W_LI = torch.ones(5, 1), torch.where(torch.arange(600) % 7 == 3, 2.0, 1.0).unsqueeze(1)
    fast = SCREENED.encode_topk(x_BI, W_LI, None, K)
    assert fast.latent_idx_N.view(5, K).sort(1).values.tolist() == [[3, 10, 17, 24]] * 5


@pytest.mark.parametrize("where", ["x", "W", "b"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_values_that_are_not_finite_or_overflow_are_done_densely(where, value):
    x_BI, W_LI, b_L = problem(6, 16, 600, 1)
    {"x": x_BI, "W": W_LI, "b": b_L}[where].view(-1)[5] = value
    dense, fast = dense_and_screened(x_BI, W_LI, b_L)
    assert torch.equal(fast.to_dense().isnan(), dense.to_dense().isnan())
    finite_BL = dense.to_dense().isfinite()
    torch.testing.assert_close(fast.to_dense()[finite_BL], dense.to_dense()[finite_BL], rtol=1e-5, atol=1e-5)


def test_few_positive_latents():
    x_BI, W_LI, _ = problem(6, 16, 600, 2)
    b_L = torch.full((600,), -50.0)
    b_L[[7, 400]] = 20
    dense, fast = dense_and_screened(x_BI, W_LI, b_L)
    assert fast.l0_B().tolist() == [2] * 6
    torch.testing.assert_close(fast.to_dense(), dense.to_dense(), rtol=1e-5, atol=1e-5)


def test_other_dtypes_take_the_dense_way():
    x_BI, W_LI, b_L = (tensor.bfloat16() for tensor in problem(6, 16, 600, 3))
    dense, fast = dense_and_screened(x_BI, W_LI, b_L)
    assert torch.equal(fast.to_dense(), dense.to_dense())


def test_gradients_are_those_of_the_dense_encode():
    grads = []
    for ops in (DENSE, SCREENED):
        x_BI, W_LI, b_L = (tensor.requires_grad_() for tensor in problem(9, 24, 600, 4))
        ops.encode_topk(x_BI, W_LI, b_L, K).to_dense().square().sum().backward()
        grads.append((x_BI.grad, W_LI.grad, b_L.grad))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
