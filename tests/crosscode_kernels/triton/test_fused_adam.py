"""Gradients that are not computed before the optimizer needs them, and the optimizer that does.

Axes: B tokens · I, O flattened widths · L latents · N entries.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from crosscode_kernels import Backend, OpSet, SparseLatents, copies
from crosscode_kernels.fused_adam import FusedAdam
from crosscode_kernels.row_sparse_adam import RowSparseAdam, clip_grad_norm_
from crosscode_kernels.segments.deferred import SegmentGrad, computed
from crosscode_kernels.triton_common.launch import recorded_launches
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton_interpreter import repaired_interpreter

L, X, D, B = 12, 2, 8, 70
FEW = 6
"""Tokens, where no latent needs more than 64 entries: the interpreter takes its time for each."""


class Run:
    """A tiny TopK crosscoder with AuxK. One latent is active on most tokens: of `B` more than 64 entries, so overflow items."""

    def __init__(
        self, options: tuple[str, ...], autocast: bool = False, n_tokens: int = FEW, backend: str = "triton"
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ops, self.autocast = OpSet(Backend(backend, options)), autocast
        self.n_tokens = n_tokens
        self.W_enc, self.W_dec = (nn.Parameter(0.3 * torch.randn(L, X, D, generator=generator)) for _ in range(2))
        self.b_enc, self.b_dec = nn.Parameter(torch.zeros(L)), nn.Parameter(torch.zeros(X * D))
        with torch.no_grad():
            self.b_enc[3] = 20.0
        self.params = [self.W_enc, self.b_enc, self.W_dec, self.b_dec]
        self.optimizer = (
            FusedAdam(self.params, lr=0.01) if options else torch.optim.Adam(self.params, lr=0.01, fused=True)
        )

    def backward(self, step: int, with_norms: bool = False) -> None:
        x_BI = torch.randn(self.n_tokens, X * D, generator=torch.Generator().manual_seed(step))
        ops, W_enc_LI, W_dec_LO = self.ops, self.W_enc.flatten(1), self.W_dec.flatten(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            latents = ops.encode_topk(x_BI, W_enc_LI, self.b_enc, 3)
            recon = ops.decode_recon_loss(latents, W_dec_LO, self.b_dec, x_BI, [D] * X)
            dead_L = torch.arange(L) < 5
            dead = (x_BI, W_enc_LI, self.b_enc, dead_L, 2, W_dec_LO, recon.residual_BO)
            loss = recon.loss + ops.dead_recon_loss(*dead) / 32
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


@pytest.mark.parametrize(
    ("with_norms", "n_steps"),
    [(True, 2), *(pytest.param(with_norms, 50, marks=pytest.mark.soak) for with_norms in (False, True))],
)
def test_steps_are_those_of_adam(with_norms, n_steps):
    one, other = Run(("deferred",), n_tokens=B), Run((), n_tokens=B, backend="torch")
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
    straight.step(0)
    with torch.no_grad():
        for param, saved in zip(resumed.params, straight.params, strict=True):
            param.copy_(saved)
    resumed.optimizer.load_state_dict(copy.deepcopy(straight.optimizer.state_dict()))
    for step in (1, 2):
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


def matrix(**options: Any) -> tuple[nn.Parameter, nn.Parameter, FusedAdam]:
    """A weight, a bias, and their optimizer."""
    weight = nn.Parameter(torch.randn(L, 2 * D, generator=torch.Generator().manual_seed(5)))
    bias = nn.Parameter(torch.zeros(L))
    return weight, bias, FusedAdam([weight, bias], **options)


def give_gradients(weight: Tensor, bias: Tensor, seed: int) -> None:
    """Of a few tokens, which touch some rows alone."""
    latents, rows_BI = entries_and_rows(seed)
    idx_BK, value_BK = latents.latent_idx_N.view(B, -1)[:2], latents.value_N.view(B, -1)[:2]
    few = SparseLatents.from_topk(idx_BK, value_BK, L).with_transpose()
    weight.grad = SegmentGrad.of(few.entries(few.by_latent), rows_BI[:2].contiguous())
    bias.grad = few.to_dense().sum(0)


@pytest.mark.parametrize("kind", ["SegmentGrad", "dense"])
def test_row_sparse_steps_are_those_of_adam_and_leave_other_rows_alone(kind):
    options = {"lr": 0.01, "betas": (0.0, 0.9)}
    weight, bias, optimizer = matrix(**options, row_sparse=True)
    plain = [nn.Parameter(param.detach().clone()) for param in (weight, bias)]
    adam = torch.optim.Adam(plain, fused=True, **options)
    by_rows = [nn.Parameter(param.detach().clone()) for param in (weight, bias)]
    rows = RowSparseAdam(by_rows, lr=0.01, beta2=0.9)
    for step in range(6):
        give_gradients(weight, bias, seed=step)
        dense = [computed(weight.grad.clone()), bias.grad.clone()]
        touched_L = (dense[0] != 0).any(1)
        assert 0 < touched_L.sum() < L
        for params in (plain, by_rows):
            params[0].grad, params[1].grad = (grad.clone() for grad in dense)
        by_rows[0].grad = dense[0].to_sparse(1)
        if kind == "dense" and step == 3:
            weight.grad = dense[0].clone()
            touched_L[:] = True
        before = weight.detach().clone()
        for one in (optimizer, adam, rows):
            one.step()
        assert torch.equal(weight[~touched_L], before[~touched_L])
        for mine, theirs in zip((weight, bias), plain, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)
        assert optimizer.state[weight]["last_step_R"].eq(step + 1).equal(touched_L)
    state, theirs = optimizer.state[weight], rows.state[by_rows[0]]
    assert state.keys() == theirs.keys()
    if kind == "SegmentGrad":
        torch.testing.assert_close(state["exp_avg_sq"], theirs["exp_avg_sq"], rtol=1e-6, atol=0)
        assert torch.equal(state["last_step_R"], theirs["last_step_R"])
        resumed = RowSparseAdam(by_rows, lr=0.01, beta2=0.9)
        resumed.load_state_dict(
            copy.deepcopy(optimizer.state_dict()) | {"param_groups": rows.state_dict()["param_groups"]}
        )
        assert resumed.state[by_rows[0]]["step"] == 6


def test_a_row_sparse_step_that_is_not_finite_changes_nothing():
    weight, bias, optimizer = matrix(lr=0.01, betas=(0.0, 0.9), row_sparse=True)
    give_gradients(weight, bias, 0)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict()["state"]), weight.detach().clone()
    give_gradients(weight, bias, 1)
    optimizer.found_inf = torch.ones(())  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.step()
    assert torch.equal(weight, before[1])
    for index, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(state[name], before[0][index][name]) for name in state)


def test_moments_in_bfloat16_have_the_right_mean_where_rounding_to_nearest_stands_still():
    weight, _, optimizer = matrix(moments=torch.bfloat16)
    signs = torch.randn(weight.shape).sign()
    for _ in range(40):
        weight.grad = 2 * signs
        optimizer.step()
        state = optimizer.state[weight]
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
        if state["step"] == 1:
            state["exp_avg_sq"].fill_(1.0)
    nearest = torch.ones((), dtype=torch.bfloat16)
    exact = torch.ones((), dtype=torch.float64)
    for _ in range(39):
        nearest = (0.999 * nearest.float() + 0.001 * 4).bfloat16()
        exact = 0.999 * exact + 0.001 * 4
    assert nearest == 1 and exact > 1.11
    found = optimizer.state[weight]["exp_avg_sq"].double()
    assert abs(found.mean() - exact) < 0.005 and found.std() < 0.05
    torch.testing.assert_close(
        optimizer.state[weight]["exp_avg"].float().abs().mean(), torch.tensor(1.97), rtol=0.01, atol=0
    )


def test_training_with_moments_in_bfloat16_goes_where_float32_goes_and_resumes_to_the_bit():
    runs = [matrix(lr=0.01, moments=dtype) for dtype in (torch.bfloat16, torch.float32, torch.bfloat16)]
    for step in range(12):
        if step == 5:  # as it is saved and read
            saved = copy.deepcopy(runs[0][2].state_dict())
            with torch.no_grad():
                for mine, theirs in zip(runs[2][:2], runs[0][:2], strict=True):
                    mine.copy_(theirs)
            runs[2][2].load_state_dict(saved)
            assert runs[2][2].state[runs[2][0]]["exp_avg_sq"].dtype == torch.bfloat16
        for weight, bias, optimizer in runs[: 3 if step >= 5 else 2]:
            give_gradients(weight, bias, step)
            optimizer.step()
    (in_16, _, optimizer), (in_32, *_), (resumed, _, other) = runs
    assert torch.equal(in_16, resumed)
    assert all(
        torch.equal(optimizer.state[in_16][name], other.state[resumed][name]) for name in ("exp_avg", "exp_avg_sq")
    )
    assert not torch.equal(in_16, in_32)
    torch.testing.assert_close(in_16, in_32, rtol=0, atol=0.01 * 12 * 2**-8)


def test_step_hooks_are_called_once():
    torch.optim.Adam([nn.Parameter(torch.zeros(1))])  # whose class then calls hooks too
    weight, bias, optimizer = matrix()
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("behind"))
    give_gradients(weight, bias, 0)
    optimizer.step()
    assert called == ["before", "behind"]


def test_a_learning_rate_in_memory_is_read_by_the_step():
    weight, bias, optimizer = matrix(lr=torch.tensor(0.5))
    other, other_bias, with_numbers = matrix(lr=0.5)
    for step, lr in enumerate((0.25, 0.125, 0.5)):
        optimizer.param_groups[0]["lr"].fill_(lr)
        with_numbers.param_groups[0]["lr"] = lr
        for pair, one in (((weight, bias), optimizer), ((other, other_bias), with_numbers)):
            give_gradients(*pair, step)
            one.step()
        assert torch.equal(weight, other) and torch.equal(bias, other_bias)


class OnOneDevice(TorchDispatchMode):
    """No op may take or give a tensor of the CPU: it would be copied to the device, or wait for it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        on_cpu = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor) and leaf.is_cpu]
        assert not on_cpu, func
        return result


@pytest.mark.parametrize("options", [{}, {"row_sparse": True, "betas": (0.0, 0.999)}, {"moments": torch.bfloat16}])
def test_norm_and_step_can_be_captured(options, static_tensors):
    """On tensors without content whatever reads one, or depends on what is in it, raises."""
    case = static_tensors.CASES[0]
    t = static_tensors.Tensors(case, torch.bfloat16)
    weight, bias = nn.Parameter(t.W_enc_LI.float()), nn.Parameter(t.b_enc_L.float())
    optimizer = FusedAdam([weight, bias], lr=0.1, **options)
    with recorded_launches() as launches:
        for step in range(2):
            grad = SegmentGrad.of(t.entries, t.x_BI).view(weight.shape).to(torch.float32)
            with OnOneDevice() if step else nullcontext():
                weight.grad, bias.grad = grad, torch.empty_like(bias)
                clip_grad_norm_([weight, bias], 1.0, optimizer)
                optimizer.step()
    names = [launch.kernel.__name__ for launch in launches]
    assert names == 2 * ["_segment_rows_kernel", "_row_norms_kernel", "_adam_rows_kernel"]
    assert launches[2].grid == launches[5].grid


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
