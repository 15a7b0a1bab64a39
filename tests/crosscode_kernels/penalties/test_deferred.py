"""Gradients of penalties that the encoder's own pass takes: nobody else sees a difference.

Axes: B tokens · L latents.
"""

from __future__ import annotations

import pytest
import torch
from crosscode_kernels.penalties.deferred import PenaltyGrad, PenaltyTerm, taken
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def slope(g, a_BL, n_L, lambda_L, c):
    return g * lambda_L * n_L / a_BL.shape[0] * torch.ones_like(a_BL)


@pytest.fixture
def grad():
    return PenaltyGrad.of(torch.rand(3, 4), PenaltyTerm(torch.tensor(2.0), torch.rand(4), torch.rand(4)), slope)


def numbers(grad):
    term = grad.pending.term
    return slope(term.g, grad.a_BL, *term[1:])


def test_a_dense_gradient_may_be_added_before_it_is_computed(grad):
    rest_BL, plain_BL, own = torch.rand(3, 4), numbers(grad), grad.pending.term
    for total in (grad + rest_BL, rest_BL + grad):
        assert isinstance(total, PenaltyGrad)
        rest, term = taken(total, grad.a_BL)
        assert torch.equal(rest, rest_BL) and term is own
        torch.testing.assert_close(total.dense(), plain_BL + rest_BL)
    torch.testing.assert_close((grad + grad).dense(), 2 * plain_BL)
    torch.testing.assert_close((grad + rest_BL + rest_BL).dense(), plain_BL + 2 * rest_BL)


def test_everything_else_sees_numbers(grad):
    plain_BL = numbers(grad)
    for one in (3 * grad, grad * 3, grad.detach() * 3, grad.clone() * 3):
        assert type(one) is Tensor
        torch.testing.assert_close(one, 3 * plain_BL)
    torch.testing.assert_close(grad.sum(0), plain_BL.sum(0))


def test_what_is_written_to_it_is_kept(grad):
    plain_BL, same = numbers(grad), grad.detach()
    assert grad.mul_(2) is grad
    torch.testing.assert_close(same * 1, 2 * plain_BL)


def test_that_of_other_latents_is_computed(grad):
    rest, term = taken(grad, grad.a_BL.clone())
    assert term.g is None and torch.equal(rest, grad.dense())


class Passes(TorchDispatchMode):
    """Reads and writes of tensors of this size, but for those of matrix products."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.found = numel, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if PenaltyGrad in types:  # which moves what it computes
            with self:
                return PenaltyGrad.__torch_dispatch__(func, types, args, kwargs)
        out = func(*args, **(kwargs or {}))
        name = func.__name__
        if not func.is_view and not name.startswith(("mm", "addmm", "detach", "empty")):
            tensors = [leaf for leaf in (*tree_leaves(args), *tree_leaves(out)) if isinstance(leaf, Tensor)]
            self.found += [name] * sum(tensor.numel() == self.numel for tensor in tensors)
        return out


def triton_step(ops, p, shift=0.0):
    latents = ops.encode_jumprelu(p.x_BI, p.W_enc_LI, p.b_enc_L, p.t_L, 2.0, "anthropic")
    n_L = ops.decoder_norms(p.W_dec_LO, p.segments, "sum").n_L
    penalized = latents.with_value(latents.value + shift) if shift else latents
    loss = ops.weighted_tanh(penalized, n_L, p.lambda_L, 4.0) + ops.pre_act_penalty(latents, p.t_L, n_L, p.lambda_L)
    y_BO = ops.sparse_decode(latents, p.W_dec_LO, p.b_dec_O)
    counts = latents.firing_counts_L()
    (loss + ops.recon_loss(y_BO, p.target_BO, p.segments).loss).backward()
    return latents, counts


def test_a_step_makes_six_passes_over_what_is_B_x_L(backend, make_problem):
    if backend.ops.name != "triton":
        pytest.skip("of the Triton backend")
    p = make_problem(33, 12, 70, 9, device=backend.device, segments=(4, 5))
    with Passes(33 * 70) as passes:
        latents, counts = triton_step(backend.ops, p)
    # Forward: h is read, a written, and read by tanh. Backward: da and h are read, dh written; a stands among what it is given.
    assert [name.partition(".")[0] for name in passes.found].count("encode_jumprelu_backward") == 3
    assert len(passes.found) == 6, passes.found
    assert torch.equal(counts, (latents.value > 0).sum(0))


def test_a_penalty_of_shifted_latents_is_that_of_shifted_latents(backend, make_problem):
    grads = []
    for ops, device in ((backend.ops, backend.device), (None, "cpu")):
        p = make_problem(33, 12, 70, 9, device=device, segments=(4, 5))
        if ops is None:
            from crosscode_kernels import resolve_backend

            ops = resolve_backend("reference", "cpu")
        triton_step(ops, p, shift=0.25)
        grads.append({name: leaf.grad.cpu() for name, leaf in p.leaves().items()})
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_hook_on_the_latents_sees_the_whole_gradient(backend, make_problem):
    seen = []
    p = make_problem(9, 12, 20, 9, device=backend.device, segments=(4, 5))
    latents = backend.ops.encode_jumprelu(p.x_BI, p.W_enc_LI, p.b_enc_L, p.t_L, 2.0, "gdm")
    if latents.value.dim() == 1:
        pytest.skip("sparse at this density")
    latents.value.register_hook(lambda grad: seen.append(grad * 1))
    ones_L = torch.ones(20, device=backend.device)
    backend.ops.weighted_tanh(latents, ones_L, ones_L, 4.0).backward()
    a_BL = latents.value.detach().double()
    expected_BL = (4 / 9) * (1 - (4 * a_BL).tanh() ** 2)
    torch.testing.assert_close(seen[0].double(), expected_BL, rtol=1e-4, atol=1e-6)
