"""The top-k encoders: what is kept, with which value, and which gradients follow.

Axes: B tokens · I flattened input dims · L latents.
"""

from __future__ import annotations

import pytest
import torch

SHAPES = [(1, 1, 1, 1), (7, 5, 63, 4), (33, 24, 257, 16), (9, 63, 1000, 7)]


def encode(ops, encoder, p, k, dead_L=None):
    if encoder == "aux_topk":
        return ops.aux_topk(p.x_BI, p.W_enc_LI, p.b_enc_L, dead_L, k)
    return getattr(ops, encoder)(p.x_BI, p.W_enc_LI, p.b_enc_L, k)


def smallest_kept(encoder, h_BL, k, dead_L=None):
    """Number kept and the float64 cut of each encoder, for comparison by value."""
    a_BL = h_BL.clamp(min=0)
    if encoder == "encode_batch_topk":
        return a_BL.flatten().topk(k * a_BL.shape[0]).values.sort().values
    if encoder == "encode_groupmax":
        return a_BL.view(a_BL.shape[0], k, -1).amax(2).flatten().sort().values
    if dead_L is not None:
        a_BL = a_BL[:, dead_L]
    return a_BL.topk(min(k, a_BL.shape[1]), dim=1).values.flatten().sort().values


@pytest.mark.parametrize("encoder", ["encode_topk", "encode_batch_topk", "encode_groupmax", "aux_topk"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("zipf", [False, True], ids=["uniform", "zipf"])
def test_values_and_gradients(backend, dtype, encoder, shape, zipf, make_problem, oracle, within_budget):
    B, I, L, k = shape  # noqa: E741
    if encoder == "encode_groupmax":
        L -= L % k
    p = make_problem(B, I, L, 3, dtype, backend.device, zipf=zipf)
    dead_L = torch.rand(L) < 0.5 if encoder == "aux_topk" else None
    latents = encode(backend.ops, encoder, p, k, None if dead_L is None else dead_L.to(backend.device))
    dense_BL = latents.to_dense()

    p64, eager = p.double(), p.clone()
    h64_BL, h_eager_BL = oracle.preacts(p64), oracle.preacts(eager)
    kept_BL = (dense_BL > 0).detach().cpu()
    within_budget(
        dense_BL.detach().cpu() * kept_BL, h_eager_BL.detach().cpu() * kept_BL, h64_BL * kept_BL, dtype, "values"
    )
    expected_N = smallest_kept(encoder, h64_BL.detach(), k, dead_L)
    eager_N = smallest_kept(encoder, h_eager_BL.detach().cpu().double(), k, dead_L)
    actual_N = dense_BL.detach().cpu().double()[kept_BL].sort().values
    n_kept = actual_N.shape[0]
    padded_N = torch.cat([torch.zeros(expected_N.shape[0] - n_kept), actual_N])
    within_budget(padded_N, eager_N, expected_N, dtype, "sorted values")

    upstream_BL = torch.randn(B, L).to(dtype)
    dense_BL.backward(upstream_BL.to(backend.device))
    oracle.latents(p64, kept_BL).backward(upstream_BL.double())
    oracle.latents(eager, kept_BL.to(backend.device)).backward(upstream_BL.to(backend.device))
    for name in ("x_BI", "W_enc_LI", "b_enc_L"):
        grads = [getattr(q, name).grad for q in (p, eager, p64)]
        within_budget(*grads, dtype, name)


@pytest.mark.parametrize("encoder", ["encode_topk", "encode_batch_topk", "encode_groupmax", "aux_topk"])
def test_equal_values_keep_the_lowest_index(backend, dtype, encoder):
    # Every pre-activation is one of two exact values, so that every cut runs through equal values.
    B, L, k = 6, 48, 4
    x_BI = torch.ones(B, 1, dtype=dtype, device=backend.device)
    W_LI = torch.where(torch.arange(L) % 3 == 1, 2.0, 1.0).to(backend.device, dtype).unsqueeze(1)
    dead_L = torch.arange(L, device=backend.device) >= 10
    if encoder == "aux_topk":
        kept = backend.ops.aux_topk(x_BI, W_LI, None, dead_L, k)
        expected = [10, 13, 16, 19]
    else:
        kept = getattr(backend.ops, encoder)(x_BI, W_LI, None, k)
        # Of 6 * 16 twos the batch keeps the first 24 in flat order: the first row and a half.
        expected = {"encode_topk": [1, 4, 7, 10], "encode_groupmax": [1, 13, 25, 37], "encode_batch_topk": None}[
            encoder
        ]
    active_BL = kept.to_dense() > 0
    if expected is None:
        twos_BL = (W_LI.squeeze(1) == 2).expand(B, L)
        expected_BL = twos_BL & (twos_BL.reshape(-1).cumsum(0).view(B, L) <= k * B)
        assert torch.equal(active_BL, expected_BL)
    else:
        assert [row.nonzero().squeeze(1).tolist() for row in active_BL] == [expected] * B


def test_batch_topk_ranks_by_the_scaled_value_and_returns_the_unscaled(backend):
    h_BL = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.5, 6.0]], device=backend.device)
    scale_L = torch.tensor([10.0, 1.0, 1.0], device=backend.device)
    latents = backend.ops.encode_batch_topk(h_BL, torch.eye(3, device=backend.device), None, 1, scale_L)
    assert latents.to_dense().tolist() == [[1, 0, 0], [4, 0, 0]]


def test_batch_topk_rows_may_hold_everything_or_nothing(backend):
    torch.manual_seed(0)
    h_BL = torch.rand(40, 300, device=backend.device)
    h_BL[3] += 10
    latents = backend.ops.encode_batch_topk(h_BL, torch.eye(300, device=backend.device), None, 8)
    l0_B = latents.l0_B()
    assert l0_B[3] == 300
    assert int(l0_B.sum()) == 320


@pytest.mark.parametrize("encoder", ["encode_topk", "encode_batch_topk", "encode_groupmax", "aux_topk"])
def test_nothing_negative_is_kept_or_counted(backend, encoder):
    h_BL = torch.tensor([[-1.0, -2.0, 3.0, -4.0], [-1.0, -1.0, -1.0, -1.0]], device=backend.device, requires_grad=True)
    eye_LI = torch.eye(4, device=backend.device)
    extra = (torch.ones(4, dtype=torch.bool, device=backend.device),) if encoder == "aux_topk" else ()
    latents = getattr(backend.ops, encoder)(h_BL, eye_LI, None, *extra, 2)
    dense_BL = latents.to_dense()
    assert dense_BL.tolist() == [[0, 0, 3, 0], [0, 0, 0, 0]]
    assert latents.firing_counts_L().tolist() == [0, 0, 1, 0]
    assert latents.l0_B().tolist() == [1, 0]
    dense_BL.sum().backward()
    assert h_BL.grad is not None
    assert h_BL.grad.tolist() == [[0, 0, 1, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("encoder", ["encode_topk", "encode_batch_topk", "encode_groupmax", "aux_topk"])
def test_nan_is_kept_and_inf_is_a_value(backend, dtype, encoder):
    h_BL = torch.zeros(2, 64, dtype=dtype, device=backend.device)
    h_BL[0, 10], h_BL[0, 20] = float("nan"), 1
    h_BL[1, 40], h_BL[1, 63] = float("inf"), -float("inf")
    # inf * 0 inside a product is NaN: the identity encoder is replaced by a bias.
    x_BI = torch.zeros(1, 1, dtype=dtype, device=backend.device)
    extra = (torch.ones(64, dtype=torch.bool, device=backend.device),) if encoder == "aux_topk" else ()
    for row, bias_L in enumerate(h_BL):
        W_LI = torch.zeros(64, 1, dtype=dtype, device=backend.device)
        dense_L = getattr(backend.ops, encoder)(x_BI, W_LI, bias_L, *extra, 2).to_dense()[0]
        if row == 0:
            assert dense_L[10].isnan()
        else:
            assert dense_L[40] == float("inf")
            assert int((dense_L != 0).sum()) == 1


@pytest.mark.parametrize("encoder", ["encode_topk", "encode_batch_topk", "encode_groupmax", "aux_topk"])
@pytest.mark.parametrize(("B", "L", "k"), [(0, 8, 2), (4, 8, 0), (3, 1, 1), (3, 6, 6), (2, 0, 0)])
def test_edge_shapes(backend, encoder, B, L, k, make_problem):
    p = make_problem(B, 5, L, 3, device=backend.device)
    dead_L = torch.ones(L, dtype=torch.bool, device=backend.device)
    latents = encode(backend.ops, encoder, p, k, dead_L)
    assert latents.to_dense().shape == (B, L)
    y_BO = backend.ops.sparse_decode(latents, p.W_dec_LO, p.b_dec_O)
    assert y_BO.shape == (B, 3)
    y_BO.sum().backward()
    assert p.W_dec_LO.grad is not None and p.W_dec_LO.grad.isfinite().all()
    assert p.W_enc_LI.grad is not None and p.W_enc_LI.grad.isfinite().all()


def test_aux_topk_with_few_or_no_dead_latents(backend, make_problem):
    p = make_problem(4, 6, 20, 3, device=backend.device)
    dead_L = torch.zeros(20, dtype=torch.bool, device=backend.device)
    assert not backend.ops.aux_topk(p.x_BI, p.W_enc_LI, p.b_enc_L, dead_L, 5).to_dense().any()
    dead_L[[3, 11]] = True
    dense_BL = backend.ops.aux_topk(p.x_BI, p.W_enc_LI, p.b_enc_L, dead_L, 5).to_dense()
    h_BL = backend.ops.preacts(p.x_BI, p.W_enc_LI, p.b_enc_L)
    torch.testing.assert_close(dense_BL, h_BL.relu() * dead_L)


def test_expanded_and_transposed_arguments(backend, make_problem):
    p = make_problem(6, 8, 30, 5, device=backend.device)
    W_IL = p.W_enc_LI.detach().t().contiguous().requires_grad_()
    x_1I = p.x_BI[:1].detach()
    strided = backend.ops.encode_topk(x_1I.expand(6, 8), W_IL.t(), p.b_enc_L, 4)
    plain = backend.ops.encode_topk(x_1I.repeat(6, 1), p.W_enc_LI, p.b_enc_L, 4)
    assert torch.equal(strided.to_dense(), plain.to_dense())
    backend.ops.sparse_decode(strided, p.W_dec_LO, None).sum().backward()
    backend.ops.sparse_decode(plain, p.W_dec_LO, None).sum().backward()
    torch.testing.assert_close(W_IL.grad, p.W_enc_LI.grad.t())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda ops, p: ops.encode_topk(p.x_BI, p.W_enc_LI, None, 31), "k is 31; must lie between 0 and .* 30"),
        (lambda ops, p: ops.encode_batch_topk(p.x_BI, p.W_enc_LI, None, -1), "k is -1"),
        (lambda ops, p: ops.encode_groupmax(p.x_BI, p.W_enc_LI, None, 7), "30 latents do not divide into k = 7"),
        (lambda ops, p: ops.encode_topk(p.x_BI[:, :3], p.W_enc_LI, None, 3), "width 3 .* width 8"),
        (lambda ops, p: ops.encode_topk(p.x_BI.half(), p.W_enc_LI, None, 3), "W_enc_LI is torch.float32 and x_BI"),
        (lambda ops, p: ops.encode_topk(p.x_BI.int(), p.W_enc_LI, None, 3), "x_BI is torch.int32; must be float16"),
        (lambda ops, p: ops.encode_topk(p.x_BI, p.W_enc_LI, p.b_enc_L[:4], 3), r"b_enc_L has shape \(4,\)"),
        (lambda ops, p: ops.encode_topk(p.x_BI[0], p.W_enc_LI, None, 3), r"x_BI has shape \(8,\)"),
        (lambda ops, p: ops.aux_topk(p.x_BI, p.W_enc_LI, None, p.b_enc_L, 3), "dead_mask_L is torch.float32"),
        (
            lambda ops, p: ops.encode_batch_topk(p.x_BI, p.W_enc_LI, None, 3, p.b_dec_O),
            r"rank_scale_L has shape \(5,\)",
        ),
        (lambda ops, p: ops.encode_topk(p.x_BI, p.W_enc_LI.to("meta"), None, 3), "W_enc_LI is on meta"),
    ],
)
def test_errors_name_the_argument_and_what_would_be_right(backend, call, message, make_problem):
    p = make_problem(6, 8, 30, 5, device=backend.device)
    with pytest.raises(ValueError, match=message):
        call(backend.ops, p)
