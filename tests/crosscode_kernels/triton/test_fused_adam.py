"""Gradients that are not computed before the optimizer needs them, and the optimizer that does.

Axes: B tokens · I, O flattened widths · L latents · N entries.
"""

from __future__ import annotations

import copy

import pytest
import torch
from crosscode_kernels import Backend, OpSet, SparseLatents, copies
from crosscode_kernels.fused_adam import FusedAdam
from crosscode_kernels.row_sparse_adam import clip_grad_norm_
from crosscode_kernels.segments.deferred import SegmentGrad
from torch import Tensor, nn
from triton_interpreter import repaired_interpreter

L, X, D, B = 12, 2, 8, 70


class Run:
    """A tiny TopK crosscoder with AuxK. One latent is active on most tokens: more than 64 entries, so overflow items."""

    def __init__(self, options: tuple[str, ...], autocast: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ops, self.autocast = OpSet(Backend("triton", options)), autocast
        self.W_enc, self.W_dec = (nn.Parameter(0.3 * torch.randn(L, X, D, generator=generator)) for _ in range(2))
        self.b_enc, self.b_dec = nn.Parameter(torch.zeros(L)), nn.Parameter(torch.zeros(X * D))
        with torch.no_grad():
            self.b_enc[3] = 20.0
        self.params = [self.W_enc, self.b_enc, self.W_dec, self.b_dec]
        self.optimizer = (
            FusedAdam(self.params, lr=0.01) if options else torch.optim.Adam(self.params, lr=0.01, fused=True)
        )

    def backward(self, step: int, with_norms: bool = False) -> None:
        x_BI = torch.randn(B, X * D, generator=torch.Generator().manual_seed(step))
        ops, W_enc_LI, W_dec_LO = self.ops, self.W_enc.flatten(1), self.W_dec.flatten(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            latents = ops.encode_topk(x_BI, W_enc_LI, self.b_enc, 3)
            recon = ops.decode_recon_loss(latents, W_dec_LO, self.b_dec, x_BI, [D] * X)
            dead_L = torch.arange(L) < 5
            y_BO = ops.dead_decode(x_BI, W_enc_LI, self.b_enc, dead_L, 2, W_dec_LO).float()
            loss = recon.loss + ops.recon_loss(y_BO, -recon.residual_BO, [X * D]).loss / 32
            if with_norms:
                loss = loss + ops.decoder_norms(W_dec_LO, [D] * X, "sum").n_L.sum()
        loss.backward()

    def step(self, step: int, **options: bool) -> Tensor:
        self.backward(step, **options)
        norm = clip_grad_norm_(self.params, 1.0, self.optimizer)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm


def entries_and_rows(seed: int, n_latents: int = L, width: int = 2 * D) -> tuple[SparseLatents, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    idx_BK = torch.rand(B, n_latents, generator=generator).argsort(1)[:, :3]
    latents = SparseLatents.from_topk(idx_BK, torch.rand(B, 3, generator=generator), n_latents).with_transpose()
    return latents, torch.randn(B, width, generator=generator)


def grad_of(seed: int) -> tuple[SegmentGrad, Tensor]:
    """A gradient that is not computed, and what it is."""
    latents, rows_BI = entries_and_rows(seed)
    return SegmentGrad.of(latents.entries(latents.by_latent), rows_BI), latents.to_dense().T @ rows_BI


@pytest.fixture(autouse=True)
def _interpreter():
    with repaired_interpreter():
        yield


@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize("n_steps", [3, pytest.param(50, marks=pytest.mark.soak)])
def test_steps_are_those_of_adam(with_norms, n_steps):
    one, other = Run(("deferred",)), Run(())
    for step in range(n_steps):
        norms = one.step(step, with_norms=with_norms), other.step(step, with_norms=with_norms)
        torch.testing.assert_close(*norms, rtol=2e-6, atol=0)
    for param, expected in zip(one.params, other.params, strict=True):
        torch.testing.assert_close(param, expected, rtol=1e-5, atol=2e-6)
    for mine, theirs in zip(one.params, other.params, strict=True):
        assert one.optimizer.state[mine].keys() == other.optimizer.state[theirs].keys()
        torch.testing.assert_close(one.optimizer.state[mine]["step"], other.optimizer.state[theirs]["step"])


def test_no_gradient_is_computed_for_the_step():
    run = Run(("deferred",))
    run.backward(0)
    clip_grad_norm_(run.params, 1.0, run.optimizer)
    run.optimizer.step()
    for weight in (run.W_enc, run.W_dec):
        assert isinstance(weight.grad, SegmentGrad)
        assert len(weight.grad.pending.sums) == 2 and weight.grad.pending.dense_LF is None
    assert isinstance(run.b_enc.grad, Tensor) and not isinstance(run.b_enc.grad, SegmentGrad)


def test_a_saved_state_goes_on_to_the_bit_with_16_bit_copies():
    straight, resumed = Run(("deferred",), autocast=True), Run(("deferred",), autocast=True)
    for step in range(3):
        straight.step(step)
    with torch.no_grad():
        for param, saved in zip(resumed.params, straight.params, strict=True):
            param.copy_(saved)
    resumed.optimizer.load_state_dict(copy.deepcopy(straight.optimizer.state_dict()))
    for step in range(3, 6):
        straight.step(step)
        resumed.step(step)
    for one, other in zip(straight.params, resumed.params, strict=True):
        assert torch.equal(one, other)


def test_the_copy_is_the_rounded_weight_and_stale_once_the_weight_is_changed():
    run = Run(("deferred",), autocast=True)
    run.step(0)
    found = copies.valid_copy(run.W_enc)
    assert found is not None and torch.equal(found, run.W_enc.detach().bfloat16())
    with torch.no_grad():
        run.W_enc[0] += 1
    assert copies.valid_copy(run.W_enc) is None
    with torch.autocast("cpu", torch.bfloat16):
        run.ops.encode_topk(torch.randn(2, X * D), run.W_enc.flatten(1), run.b_enc, 3)
    found = copies.valid_copy(run.W_enc)
    assert found is not None and torch.equal(found, run.W_enc.detach().bfloat16())


def test_without_an_optimizer_that_keeps_it_the_copy_lives_from_forward_to_backward():
    run = Run((), autocast=True)
    x_BI = torch.randn(2, X * D)
    with torch.autocast("cpu", torch.bfloat16):
        value_N = run.ops.encode_topk(x_BI, run.W_enc.flatten(1), run.b_enc, 3).value
    assert copies.valid_copy(run.W_enc) is not None
    value_N.sum().backward()
    assert copies.valid_copy(run.W_enc) is None
    assert run.W_enc.grad is not None and run.W_enc.grad.dtype == torch.float32


def test_a_step_that_is_not_finite_changes_nothing():
    run = Run(("deferred",))
    run.step(0)
    before = [param.detach().clone() for param in run.params]
    states = copy.deepcopy(run.optimizer.state_dict())
    run.backward(1)
    clip_grad_norm_(run.params, 1.0, run.optimizer)
    run.optimizer.found_inf = torch.ones(())  # pyright: ignore[reportAttributeAccessIssue]
    run.optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(before, run.params, strict=True))
    for index, state in run.optimizer.state_dict()["state"].items():
        assert all(torch.equal(state[name], states["state"][index][name]) for name in state)


def test_sums_reshapes_and_casts_compute_nothing():
    (one, dense), (other, more) = grad_of(1), grad_of(2)
    total = (one.view(L, 2, D) + other.view(L, 2, D)).to(torch.float64)
    assert isinstance(total, SegmentGrad) and len(total.pending.sums) == 2
    torch.testing.assert_close(total.dense().float(), (dense + more).view(L, 2, D))
    assert len(one.pending.sums) == 1, "a sum leaves its summands as they were"
    torch.testing.assert_close(one.dense(), dense)


def test_a_third_sum_and_a_tensor_are_added_up():
    (one, a), (two, b), (three, c) = grad_of(1), grad_of(2), grad_of(3)
    plain = torch.randn(L, 2 * D)
    total = one + two
    total += three
    total = plain + total
    assert isinstance(total, SegmentGrad) and not total.pending.sums
    torch.testing.assert_close(total.dense(), a + b + c + plain)


def test_what_is_written_to_a_view_is_seen_by_the_gradient():
    grad, dense = grad_of(1)
    in_3d = grad.view(L, 2, D)
    in_3d[2:4].zero_()
    in_3d.mul_(2)
    dense[2:4] = 0
    torch.testing.assert_close(grad.dense(), 2 * dense)


def test_other_optimizers_and_clipping_get_ordinary_gradients():
    run, other = Run(("deferred",)), Run(())
    for one in (run, other):
        one.optimizer = torch.optim.SGD(one.params, lr=0.1)
        one.step(0)
    for param, expected in zip(run.params, other.params, strict=True):
        torch.testing.assert_close(param, expected)
