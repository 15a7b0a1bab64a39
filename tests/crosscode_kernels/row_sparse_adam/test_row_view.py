"""Weights as matrices: gradients of every form pass, and dense ones are not copied.

Axes: L rows · X, D dimensions of a row.
"""

from __future__ import annotations

import torch
from crosscode_kernels.row_view import row_view

L, X, D = 6, 2, 3


def test_dense_and_row_sparse_gradients_add_up_to_a_dense_one():
    W_LXD = torch.randn(L, X, D, requires_grad=True)
    rows_Q, values_QF = torch.tensor([1, 4]), torch.randn(2, X * D)
    sparse = torch.sparse_coo_tensor(rows_Q[None], values_QF, (L, X * D), is_coalesced=True, check_invariants=True)
    torch.autograd.backward([row_view(W_LXD), row_view(W_LXD)], [torch.ones(L, X * D), sparse])
    expected = torch.ones(L, X, D)
    expected[rows_Q] += values_QF.view(2, X, D)
    torch.testing.assert_close(W_LXD.grad, expected)


def test_a_row_sparse_gradient_alone_keeps_its_rows():
    W_LXD = torch.randn(L, X, D, requires_grad=True)
    sparse = torch.sparse_coo_tensor([[2]], torch.ones(1, X * D), (L, X * D), check_invariants=True)
    row_view(W_LXD).backward(sparse)
    assert W_LXD.grad.is_sparse and W_LXD.grad.shape == (L, X, D)
    assert W_LXD.grad.to_dense()[2].tolist() == [[1.0] * D] * X


def test_gradients_of_gradients_pass():
    W_LXD = torch.randn(L, X, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda W_LXD: row_view(W_LXD).pow(3).sum(), W_LXD)
