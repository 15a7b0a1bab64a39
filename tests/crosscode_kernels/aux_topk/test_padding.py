"""Padding fills shapes and nothing else: it is in no segment, costs no gradient, and what is not there is not kept.

Axes: B tokens · I flattened input dims · O flattened output dims · L latents · N stored entries.
"""

from __future__ import annotations

import pytest
import torch
from crosscode_kernels import SparseLatents
from torch import Tensor

B, I, L, O, K = 9, 6, 40, 7, 8  # noqa: E741


def dead_mask(n_dead: int, device: str) -> Tensor:
    mask_L = torch.zeros(L, dtype=torch.bool, device=device)
    mask_L[5 : 5 + n_dead] = True
    return mask_L


def padded_aux_topk(ops, p, dead_L, k):
    """As on a device or in a traced program: the number of dead latents is not known, rows are padded to k entries."""
    from crosscode_kernels.aux_topk import _encode
    from crosscode_kernels.encoder import Encoder

    return _encode(Encoder(p.x_BI, p.W_enc_LI, p.b_enc_L), dead_L, k, backend=ops.backend)


@pytest.mark.parametrize("n_dead", [0, 1, 3, L])
def test_segments_hold_the_positive_entries_and_no_padding(fast_backend, n_dead, make_problem):
    p = make_problem(B, I, L, O, device=fast_backend.device)
    latents = padded_aux_topk(fast_backend.ops, p, dead_mask(n_dead, fast_backend.device), K)
    assert latents.by_latent is not None
    order_N, ptr_L1 = latents.by_latent
    n_stored = int((latents.value_N != 0).sum())
    assert latents.value_N.shape == order_N.shape == (B * K,)
    assert int(ptr_L1[-1]) == n_stored
    owner_N = torch.repeat_interleave(torch.arange(L, device=ptr_L1.device), ptr_L1.diff().long())
    assert torch.equal(latents.latent_idx_N[order_N[:n_stored].long()].long(), owner_N)
    assert order_N.sort().values.tolist() == list(range(B * K))


@pytest.mark.parametrize("n_dead", [0, 1, 3, L])
@pytest.mark.parametrize("padded", [True, False])
def test_gradients_are_those_of_the_formula_twice_to_the_bit(
    fast_backend, n_dead, padded, make_problem, oracle, within_budget
):
    p = make_problem(B, I, L, O, device=fast_backend.device)
    dead_L = dead_mask(n_dead, fast_backend.device)
    runs = []
    for _ in range(2):
        q = p.clone()
        encode = padded_aux_topk if padded else lambda ops, q, dead_L, k: ops.aux_topk(*encoder(q), dead_L, k)
        latents = encode(fast_backend.ops, q, dead_L, K)
        loss = fast_backend.ops.decode_recon_loss(latents, q.W_dec_LO, None, q.target_BO, (O,)).loss
        if loss.requires_grad:
            loss.backward()
        runs.append([loss.detach(), *(grad_of(leaf) for leaf in weights(q))])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))

    found = []
    for r in (p.double(), p.clone()):
        h_BL = oracle.preacts(r) * dead_L.to(r.x_BI.device)
        kept_BL = oracle.topk_kept(h_BL.detach(), K)
        loss = (oracle.latents(r, kept_BL) @ r.W_dec_LO - r.target_BO).pow(2).sum(1).mean()
        loss.backward()
        found.append([loss.detach(), *(grad_of(leaf) for leaf in weights(r))])
    for actual, exact, eager in zip(runs[0], *found, strict=True):
        within_budget(actual, eager, exact, torch.float32)


def encoder(p):
    return p.x_BI, p.W_enc_LI, p.b_enc_L


def weights(p):
    return p.W_enc_LI, p.b_enc_L, p.W_dec_LO


def grad_of(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def silent_batch(ops, device):
    """Latents of a batch whose first token has no positive pre-activation: it is stored as padding alone."""
    x_BI = torch.ones(3, 1, device=device)
    x_BI[0] = 0
    W_LI = torch.ones(L, 1, device=device, requires_grad=True)
    return ops.encode_topk(x_BI, W_LI, torch.full((L,), -0.5, device=device), 4)


def test_a_token_of_padding_reaches_no_weight(fast_backend):
    W_LO = torch.ones(L, O, device=fast_backend.device, requires_grad=True)
    latents = silent_batch(fast_backend.ops, fast_backend.device)
    dy_BO = torch.ones(3, O, device=fast_backend.device)
    dy_BO[0] = float("nan")
    fast_backend.ops.sparse_decode(latents, W_LO).backward(dy_BO)
    assert W_LO.grad[:4].tolist() == [[1.0] * O] * 4
    assert not W_LO.grad[4:].any()


def test_a_slice_by_latent_range_leaves_the_other_latents_out(fast_backend, make_problem):
    p = make_problem(B, I, L, O, device=fast_backend.device)
    part = fast_backend.ops.encode_topk(*encoder(p), K).slice_latents(8, 16)
    n_inside = int((part.value_N != 0).sum())
    assert 0 < n_inside < part.value_N.shape[0]
    assert int(part.transpose().latent_ptr_L1[-1]) == n_inside


def test_where_looking_is_free_nothing_dead_leaves_nothing():
    from crosscode_kernels import resolve_backend

    ops = resolve_backend("torch", "cpu")
    x_BI, W_LI = torch.randn(B, I), torch.randn(L, I, requires_grad=True)
    W_LO = torch.randn(L, O, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        none = ops.aux_topk(x_BI, W_LI, None, dead_mask(0, "cpu"), K)
        y_BO = ops.sparse_decode(none, W_LO)
    assert isinstance(none, SparseLatents) and none.value_N.shape == (0,) and none.to_dense().shape == (B, L)
    assert not y_BO.any() and not y_BO.requires_grad and not saved
    assert ops.aux_topk(x_BI, W_LI, None, dead_mask(3, "cpu"), K).value_N.shape == (3 * B,)
