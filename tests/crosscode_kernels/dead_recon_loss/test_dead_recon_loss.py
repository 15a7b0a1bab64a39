"""What dead latents leave of an error: dense products over few of them give what the sparse ops give.

Axes: B tokens · I flattened input dims · O flattened output dims · L latents.
"""

from __future__ import annotations

import pytest
import torch
from crosscode_kernels import dead_recon_loss, resolve_backend
from crosscode_kernels.dead_recon_loss import torch_impl

B, I, L, O = 9, 6, 40, 7  # noqa: E741


def leaves(p):
    return p.x_BI, p.W_enc_LI, p.b_enc_L, p.W_dec_LO


def dead_mask(n_dead, device):
    mask_L = torch.zeros(L, dtype=torch.bool, device=device)
    mask_L[L - n_dead :] = True
    return mask_L


@pytest.mark.parametrize(("n_dead", "k"), [(0, 4), (3, 8), (3, 3), (12, 5), (L, 1), (7, 0)])
def test_loss_and_gradients_are_those_of_the_formula(backend, n_dead, k, make_problem, oracle, within_budget):
    p = make_problem(B, I, L, O, device=backend.device)
    dead_L = dead_mask(n_dead, backend.device)
    loss = backend.ops.dead_recon_loss(p.x_BI, p.W_enc_LI, p.b_enc_L, dead_L, k, p.W_dec_LO, p.target_BO)
    if loss.requires_grad:
        loss.backward()
    found = []
    for r in (p.double(), p.clone()):
        kept_BL = oracle.topk_kept(oracle.preacts(r).detach() * dead_L.to(r.x_BI.device), k)
        expected = (r.target_BO + oracle.latents(r, kept_BL) @ r.W_dec_LO).square().sum(1).mean()
        expected.backward()
        found.append([expected, *(leaf.grad for leaf in leaves(r))])
    actual = [loss, *(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves(p))]
    for ours, exact, eager in zip(actual, *found, strict=True):
        within_budget(ours, eager, exact, torch.float32)


def test_both_ways_are_taken_on_a_cpu(make_problem, monkeypatch):
    p = make_problem(B, I, L, O)
    taken = []
    dense = torch_impl.dead_recon_loss
    monkeypatch.setattr(torch_impl, "dead_recon_loss", lambda *args: taken.append(args[1].shape[0]) or dense(*args))
    ops = resolve_backend("torch", "cpu")
    for n_dead, k in ((8, 4), (L, 6), (L, 4), (L, 0)):
        ops.dead_recon_loss(p.x_BI, p.W_enc_LI, p.b_enc_L, dead_mask(n_dead, "cpu"), k, p.W_dec_LO, p.target_BO)
    assert taken == [8, L]  # 6 of 40 are 15 %, 4 are 10 %


def test_a_row_sparse_gradient_is_added_in_place_to_a_dense_one(make_problem):
    p, q = (make_problem(B, I, L, O) for _ in range(2))
    ops, dead_L = resolve_backend("torch", "cpu"), dead_mask(5, "cpu")

    def loss_of(r, sparse_grad):
        main = ops.decode_recon_loss(ops.encode_topk(*leaves(r)[:3], 4), r.W_dec_LO, None, r.target_BO, (O,)).loss
        dead = (*leaves(r)[:3], dead_L, 4, r.W_dec_LO, r.target_BO)
        return main + ops.dead_recon_loss(*dead, sparse_grad=sparse_grad)

    loss_of(p, False).backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        loss_of(q, True).backward()
    for name in ("W_enc_LI", "W_dec_LO", "b_enc_L", "x_BI"):
        assert not getattr(q, name).grad.is_sparse
        torch.testing.assert_close(getattr(q, name).grad, getattr(p, name).grad, msg=name)
    whole = [[L, I], [L, O]]
    copies = [
        e for e in profile.events() if e.name == "aten::copy_" and e.input_shapes[:1] and e.input_shapes[0] in whole
    ]
    assert not copies


def test_gradients_alone_are_sparse_only_where_asked(make_problem):
    p = make_problem(B, I, L, O)
    arguments = (*leaves(p)[:3], dead_mask(5, "cpu"), 4, p.W_dec_LO, p.target_BO)
    dead_recon_loss(*arguments, sparse_grad=True, backend="torch").backward()
    assert p.W_dec_LO.grad.is_sparse and p.W_enc_LI.grad.is_sparse
    sparse = p.W_dec_LO.grad.to_dense()
    p.W_dec_LO.grad = p.W_enc_LI.grad = None
    dead_recon_loss(*arguments, backend="torch").backward()
    assert not p.W_dec_LO.grad.is_sparse
    torch.testing.assert_close(p.W_dec_LO.grad, sparse)
