"""RowSparseAdam is Adam with beta1 = 0; the clip takes sparse gradients.

Axes: R rows · D width.
"""

from __future__ import annotations

import pytest
import torch
from crosscode_kernels import Backend, OpSet, row_sparse_adam
from crosscode_kernels.fused_adam import FusedAdam
from crosscode_kernels.row_sparse_adam import RowSparseAdam, clip_grad_norm_, coalesced, grad_norm
from torch.utils._python_dispatch import TorchDispatchMode


def sparse_grad(touched_R, R, D, generator):
    rows_Q = touched_R.nonzero().squeeze(1)
    values_QD = torch.randn(rows_Q.shape[0], D, generator=generator)
    return torch.sparse_coo_tensor(rows_Q.unsqueeze(0), values_QD, (R, D), check_invariants=True).coalesce()


@pytest.mark.parametrize("always_dense", [False, True])
def test_the_numbers_are_those_of_adam(always_dense):
    R, D = 40, 6
    generator = torch.Generator().manual_seed(0)
    start_RD = torch.randn(R, D, generator=generator)
    lazy, plain = start_RD.clone().requires_grad_(), start_RD.clone().requires_grad_()
    bias, plain_bias = torch.zeros(D, requires_grad=True), torch.zeros(D, requires_grad=True)
    ours = RowSparseAdam([lazy, bias], lr=0.03, beta2=0.95)
    adam = torch.optim.Adam([plain, plain_bias], lr=0.03, betas=(0.0, 0.95))
    for step in range(60):
        # Some rows wait dozens of steps; every tenth gradient is dense, as a constraint or a norm would make it.
        grad = sparse_grad(torch.rand(R, generator=generator) < torch.linspace(0, 0.5, R), R, D, generator)
        lazy.grad = grad.to_dense() if always_dense or step % 10 == 9 else grad
        plain.grad = grad.to_dense()
        bias.grad = plain_bias.grad = torch.randn(D, generator=generator)
        ours.step()
        adam.step()
    torch.testing.assert_close(lazy, plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(bias, plain_bias, rtol=1e-5, atol=1e-6)
    # A row that was never touched has not moved.
    assert torch.equal(lazy[0], start_RD[0])


def test_state_survives_saving_and_loading():
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(10, 3, generator=generator).requires_grad_() for _ in range(2)]
    with torch.no_grad():
        params[1].copy_(params[0])
    grads = [sparse_grad(torch.rand(10, generator=generator) < 0.4, 10, 3, generator) for _ in range(8)]
    straight, first = RowSparseAdam([params[0]], lr=0.1), RowSparseAdam([params[1]], lr=0.1)
    for i, grad in enumerate(grads):
        if i == 4:
            second = RowSparseAdam([params[1]], lr=0.1)
            second.load_state_dict(first.state_dict())
            first = second
        params[0].grad = params[1].grad = grad
        straight.step()
        first.step()
    assert torch.equal(params[0], params[1])


@pytest.mark.parametrize(
    "make",
    [
        lambda params: RowSparseAdam(params, lr=0.1),
        lambda params: FusedAdam(params, betas=(0.0, 0.9), row_sparse=True, moments=torch.bfloat16),
    ],
    ids=["RowSparseAdam", "FusedAdam"],
)
def test_a_hook_that_keeps_some_rows_of_a_state_is_followed_and_dtypes_stay(make):
    whole, part = (make([torch.nn.Parameter(torch.randn(n, 3))]) for n in (10, 4))
    (param,), (own,) = whole.param_groups[0]["params"], part.param_groups[0]["params"]
    v = torch.rand(10, 3).to(getattr(whole, "moments", torch.float32))
    whole.state[param] = {"step": torch.tensor(3.0), "exp_avg_sq": v, "last_step_R": torch.arange(10).int()}

    def rows(_, given):
        of = {name: value[2:6] if value.dim() else value for name, value in given["state"][0].items()}
        return {**given, "state": {0: of}}

    part.register_load_state_dict_pre_hook(rows)
    part.load_state_dict(whole.state_dict())
    state = part.state[own]
    assert state["exp_avg_sq"].dtype == v.dtype and torch.equal(state["exp_avg_sq"], v[2:6])
    assert state["last_step_R"].dtype == torch.int32 and state["last_step_R"].tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize("max_norm", [0.1, 100.0])
def test_the_clip_is_torchs(max_norm):
    generator = torch.Generator().manual_seed(0)
    grad = sparse_grad(torch.rand(20, generator=generator) < 0.5, 20, 4, generator)
    sparse, dense, bias = (torch.zeros(20, 4, requires_grad=True) for _ in range(3))
    sparse.grad, dense.grad, bias.grad = grad, grad.to_dense(), torch.ones(20, 4)
    other = bias.detach().clone().requires_grad_()
    other.grad = bias.grad.clone()
    ours = clip_grad_norm_([sparse, bias], max_norm)
    theirs = torch.nn.utils.clip_grad_norm_([dense, other], max_norm)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(sparse.grad.to_dense(), dense.grad)
    torch.testing.assert_close(bias.grad, other.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_fused_adam_applies_the_clip_itself(dtype):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(30, generator=generator, dtype=dtype)
    params = [start.clone().requires_grad_() for _ in range(2)]
    fused = torch.optim.Adam([params[0]], lr=0.1, fused=True)
    plain = torch.optim.Adam([params[1]], lr=0.1)
    for scale in (10.0, 0.01, 3.0):
        grad = scale * torch.randn(30, generator=generator, dtype=dtype)
        params[0].grad, params[1].grad = grad.clone(), grad.clone()
        clip_grad_norm_([params[0]], 1.0, fused)
        torch.nn.utils.clip_grad_norm_([params[1]], 1.0)
        fused.step()
        plain.step()
    torch.testing.assert_close(params[0], params[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_row_sparse_adam_applies_the_clip_itself_and_once(dtype):
    generator = torch.Generator().manual_seed(0)
    start_RD = torch.randn(20, 4, generator=generator).to(dtype)
    results = []
    for scales_itself in (True, False):
        params = [start_RD.clone().requires_grad_(), start_RD[0].clone().requires_grad_()]
        optimizer = RowSparseAdam(params, lr=0.1, beta2=0.9)
        generator.manual_seed(1)
        for max_norm in (0.5, 1e9, 0.1, None):
            grad = sparse_grad(torch.rand(20, generator=generator) < 0.4, 20, 4, generator)
            params[0].grad, params[1].grad = grad.to(dtype), torch.randn(4, generator=generator).to(dtype)
            clip_grad_norm_(params, max_norm, optimizer if scales_itself else None)
            optimizer.step()
        results.append(params)
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_norm_of_many_gradients_is_exact_to_rounding(dtype):
    params = [
        torch.zeros(shape, dtype=dtype, requires_grad=True) for shape in ((4096, 1024), (7,), (0, 3), (3, 2, 5), ())
    ]
    for param in params:
        param.grad = torch.randn(param.shape).to(dtype)
    truth = sum(param.grad.double().square().sum() for param in params).sqrt()
    torch.testing.assert_close(grad_norm(params).double(), truth, rtol=1e-6, atol=0)


def test_no_gradients_have_norm_zero():
    assert grad_norm([torch.zeros(3, requires_grad=True)]).item() == 0
    assert clip_grad_norm_([torch.zeros(3, requires_grad=True)], 1.0).item() == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: RowSparseAdam([p], lr=-1.0), "lr is -1.0; must not be negative"),
        (lambda p: RowSparseAdam([p], beta2=1.0), r"beta2 is 1.0; must lie in \[0, 1\)"),
        (lambda p: RowSparseAdam([p], eps=-1e-8), "eps is -1e-08; must not be negative"),
        (lambda p: clip_grad_norm_([p], 0.0), "max_norm is 0.0; must be positive"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 2, requires_grad=True))


def test_training_with_row_sparse_gradients_is_training_with_dense_ones(make_problem):
    losses = []
    for sparse in (True, False):
        p = make_problem(16, 8, 200, 6)
        params = [p.W_enc_LI, p.b_enc_L, p.W_dec_LO, p.b_dec_O]
        ops = OpSet(Backend("torch", ("rows",) if sparse else ()))
        betas = {"beta2": 0.99} if sparse else {"betas": (0.0, 0.99)}
        optimizer = (RowSparseAdam if sparse else torch.optim.Adam)(params, lr=0.01, **betas)
        generator = torch.Generator().manual_seed(0)
        losses.append([])
        for _ in range(12):
            x_BI = torch.randn(16, 8, generator=generator)
            latents = ops.encode_topk(x_BI, p.W_enc_LI, p.b_enc_L, 3)
            y_BO = ops.sparse_decode(latents, p.W_dec_LO, p.b_dec_O)
            loss = ops.recon_loss(y_BO, x_BI[:, :6], (6,)).loss
            optimizer.zero_grad()
            loss.backward()
            assert p.W_enc_LI.grad.is_sparse == p.W_dec_LO.grad.is_sparse == sparse
            clip_grad_norm_(params, 1.0)
            optimizer.step()
            losses[-1].append(loss.item())
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4, atol=1e-5)


def test_ascending_rows_are_coalesced_without_a_copy_and_others_are_added_up():
    values_QD = torch.randn(3, 4)
    ascending = torch.sparse_coo_tensor([[1, 4, 7]], values_QD, (9, 4), check_invariants=True)
    assert not ascending.is_coalesced()
    assert coalesced(ascending).is_coalesced()
    assert coalesced(ascending).values().data_ptr() == ascending._values().data_ptr()
    for rows_Q in ([4, 1, 7], [1, 4, 4]):
        grad = torch.sparse_coo_tensor([rows_Q], values_QD, (9, 4), check_invariants=True)
        assert torch.equal(coalesced(grad).to_dense(), grad.to_dense())
        assert coalesced(grad).indices()[0].tolist() == sorted(set(rows_Q))


class CountedOps(TorchDispatchMode):
    n_ops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n_ops += 1
        return func(*args, **(kwargs or {}))


def test_on_a_device_few_launches_do_what_many_cache_sized_blocks_do_on_the_cpu(monkeypatch):
    R, D = 1000, 512
    generator = torch.Generator().manual_seed(0)
    start_RD = torch.randn(R, D, generator=generator)
    grads = [sparse_grad(torch.rand(R, generator=generator) < share, R, D, generator) for share in (1, 0.3, 0.6)]
    results, n_ops = [], []
    for elements in (row_sparse_adam._CPU_CHUNK_ELEMENTS, row_sparse_adam._DEVICE_CHUNK_ELEMENTS):
        monkeypatch.setattr(row_sparse_adam, "_CPU_CHUNK_ELEMENTS", elements)
        param_RD = start_RD.clone().requires_grad_()
        optimizer = RowSparseAdam([param_RD], lr=0.03, beta2=0.95)
        with CountedOps() as counted:
            for param_RD.grad in grads:
                optimizer.step()
        results.append(param_RD.detach())
        n_ops.append(counted.n_ops / len(grads))
    assert torch.equal(*results)
    assert n_ops[1] < 40 < n_ops[0]
    # The case that had 124,000 launches: both weights of 131,072 latents of width 4608.
    n_chunks = 131072 / (row_sparse_adam._DEVICE_CHUNK_ELEMENTS // 4608)
    assert 2 * n_chunks * n_ops[1] < 1000


def test_a_device_is_updated_in_large_chunks():
    assert row_sparse_adam._chunk_rows(torch.device("cuda"), 4608) == row_sparse_adam._DEVICE_CHUNK_ELEMENTS // 4608
    assert row_sparse_adam._chunk_rows(torch.device("cpu"), 4608) == row_sparse_adam._CPU_CHUNK_ELEMENTS // 4608
    assert row_sparse_adam._chunk_rows(torch.device("cuda"), 1 << 30) == 1
