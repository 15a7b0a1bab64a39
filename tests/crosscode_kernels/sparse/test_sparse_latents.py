"""SparseLatents: both constructions, the transpose, slices by latent range.

Axes: B tokens · L latents · K entries per token.
"""

from __future__ import annotations

import pytest
import torch
from crosscode_kernels import DenseLatents, SparseLatents
from hypothesis import given, settings
from hypothesis import strategies as st


@st.composite
def dense_batches(draw):
    shape = draw(st.integers(0, 9)), draw(st.integers(1, 17))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    density = draw(st.sampled_from([0.0, 0.2, 1.0]))
    return torch.rand(shape, generator=generator) * (torch.rand(shape, generator=generator) < density)


@given(dense_batches())
@settings(max_examples=60, deadline=None)
def test_dense_and_sparse_forms_agree(dense_BL):
    sparse, dense = SparseLatents.from_dense(dense_BL), DenseLatents(dense_BL)
    assert torch.equal(sparse.to_dense(), dense_BL)
    assert torch.equal(sparse.l0_B(), dense.l0_B())
    assert torch.equal(sparse.firing_counts_L(), dense.firing_counts_L())
    largest_L = [max([0.0, *column]) for column in dense_BL.T.tolist()]
    assert sparse.max_L().tolist() == dense.max_L().tolist() == pytest.approx(largest_L)
    some_N = torch.randperm(dense_BL.shape[1])[:3]
    assert torch.equal(sparse.columns_BN(some_N), dense_BL[:, some_N])
    assert torch.equal(dense.columns_BN(some_N), dense_BL[:, some_N])
    assert sparse.row_ptr_B1.dtype == sparse.latent_idx_N.dtype == torch.int32
    assert (sparse.batch_size, sparse.n_latents) == dense_BL.shape


@given(dense_batches())
@settings(max_examples=60, deadline=None)
def test_the_transpose_lists_the_tokens_of_each_latent_in_order(dense_BL):
    sparse = SparseLatents.from_dense(dense_BL).with_transpose()
    order_N, ptr_L1 = sparse.transpose()
    assert order_N.dtype == ptr_L1.dtype == torch.int32
    token_idx_N = sparse.token_idx_N()
    for latent in range(sparse.n_latents):
        entries = order_N[ptr_L1[latent] : ptr_L1[latent + 1]]
        assert torch.equal(token_idx_N[entries], dense_BL[:, latent].nonzero().squeeze(1))
        assert torch.equal(sparse.value_N[entries], dense_BL[:, latent][dense_BL[:, latent] != 0])


@given(dense_batches(), st.data())
@settings(max_examples=60, deadline=None)
def test_a_slice_by_latent_range_is_the_slice_of_the_dense_form(dense_BL, data):
    start = data.draw(st.integers(0, dense_BL.shape[1]))
    stop = data.draw(st.integers(start, dense_BL.shape[1]))
    part = SparseLatents.from_dense(dense_BL).slice_latents(start, stop)
    assert torch.equal(part.to_dense(), dense_BL[:, start:stop])


def test_slices_decode_to_the_whole(fast_backend, make_problem):
    p = make_problem(9, 5, 24, 7, device=fast_backend.device)
    ops = fast_backend.ops
    latents = ops.encode_topk(p.x_BI, p.W_enc_LI, p.b_enc_L, 4)
    parts = [ops.sparse_decode(latents.slice_latents(lo, lo + 8), p.W_dec_LO[lo : lo + 8], None) for lo in (0, 8, 16)]
    torch.testing.assert_close(sum(parts), ops.sparse_decode(latents, p.W_dec_LO, None))


def test_construction_from_topk_keeps_stored_zeros():
    latents = SparseLatents.from_topk(torch.tensor([[3, 1], [0, 2]]), torch.tensor([[1.0, 0.0], [2.0, 3.0]]), 4)
    assert latents.row_ptr_B1.tolist() == [0, 2, 4]
    assert latents.to_dense().tolist() == [[0, 0, 0, 1], [2, 0, 3, 0]]
    assert latents.l0_B().tolist() == [1, 2]


def test_to_dense_and_from_dense_are_differentiable():
    value_BL = torch.tensor([[0.0, 2.0], [3.0, 0.0]], requires_grad=True)
    weight_BL = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    (SparseLatents.from_dense(value_BL).to_dense() * weight_BL).sum().backward()
    assert value_BL.grad.tolist() == [[0, 2], [3, 0]]


def test_the_encoder_computes_the_transpose_when_a_gradient_will_need_it(fast_backend, make_problem):
    p = make_problem(5, 4, 20, 3, device=fast_backend.device)
    assert fast_backend.ops.encode_topk(p.x_BI, p.W_enc_LI, p.b_enc_L, 3).by_latent is not None
    with torch.no_grad():
        assert fast_backend.ops.encode_topk(p.x_BI, p.W_enc_LI, p.b_enc_L, 3).by_latent is None


def test_a_range_outside_is_refused():
    latents = SparseLatents.from_dense(torch.ones(2, 4))
    with pytest.raises(ValueError, match="3:5 is not a range within the 4 latents"):
        latents.slice_latents(3, 5)
