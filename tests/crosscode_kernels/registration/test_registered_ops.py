"""Registered ops: opcheck, compilation, autocast, determinism.

Axes: B tokens · I flattened input dims · O flattened output dims · L latents.
"""

from __future__ import annotations

import os

import pytest
import torch
from crosscode_kernels import SparseLatents, resolve_backend
from crosscode_kernels.registration import kernel_names

B, I, L, O, K = 5, 6, 24, 8, 3  # noqa: E741
NAME = "triton" if os.environ.get("TRITON_INTERPRET") == "1" else "torch"
"""Whose kernels registered ops are told to take: Triton's run here in the interpreter only."""
named = pytest.mark.parametrize("name", [pytest.param(NAME, id=f"{NAME}-interpreted" if NAME == "triton" else NAME)])
BACKEND = (NAME, [])
ENCODERS = ["encode_topk", "encode_batch_topk", "encode_groupmax", "aux_topk"]


def tensors():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, requires_grad=True)

    return normal(B, I), normal(L, I), normal(L), normal(L, O), normal(O)


def sparse_batch():
    with torch.no_grad():
        x_BI, W_LI, *_ = tensors()
        return resolve_backend(NAME, "cpu").encode_topk(x_BI, W_LI, None, K).with_transpose()


def in_segments(entries):
    """Two tokens for each: one entry, and the others."""
    ends_BS = entries.row_ptr_B1[:-1, None] + torch.tensor([1, K], dtype=torch.int32)
    return entries._replace(row_ptr_B1=torch.cat([entries.row_ptr_B1[:1], ends_BS.flatten()]))


def one_behind_the_other(entries, with_grad=True):
    """The same batch of two dictionaries; by default the values want a gradient."""
    both = type(entries)(*(torch.cat([field, field]).detach() for field in entries))
    return both._replace(value_N=both.value_N.requires_grad_(with_grad))


def op_calls():
    x_BI, W_LI, b_L, W_LO, b_O = tensors()
    h_BL = torch.randn(B, L, requires_grad=True)
    t_L, n_L, lam_L = torch.zeros(L, requires_grad=True), torch.rand(L, requires_grad=True), torch.rand(L)
    dead_L = torch.arange(L) % 2 == 0
    s = sparse_batch()
    value_N = s.value_N.detach().requires_grad_()
    a_BL, y_BO, g = h_BL.detach().relu().requires_grad_(), torch.randn(B, O, requires_grad=True), torch.ones(())
    norms = torch.rand(L, 2), torch.rand(L)
    plain_LO, plain_BL, plain_BO = W_LO.detach(), h_BL.detach(), y_BO.detach()
    N = s.value_N.shape[0]
    entries, values = s.entries(s.by_latent), s.entries(s.by_latent)._replace(value_N=value_N)
    calls = {
        "encode_topk": (x_BI, W_LI, b_L, K, True),
        "encode_groupmax": (x_BI, W_LI, b_L, K, True),
        "aux_topk": (x_BI, W_LI, b_L, dead_L, K, True),
        "encode_batch_topk": (x_BI, W_LI, b_L, K, torch.rand(L), True),
        "encode_jumprelu": (plain_BL, t_L, x_BI, W_LI, b_L, 2.0, False),
        "encode_jumprelu_backward": (
            plain_BL,
            torch.rand(L),
            plain_BL,
            t_L.detach(),
            2.0,
            True,
            None,
            None,
            None,
            None,
        ),
        "latent_order": (s.latent_idx_N, L),
        "gather_dot": (*entries, plain_BO, plain_LO),
        "segment_rows": (*entries, plain_BO),
        "sparse_decode": (*values, W_LO, b_O),
        "nested_decode": (*in_segments(values), W_LO, b_O, 2),
        "grouped_decode": (
            *one_behind_the_other(values),
            [N, N],
            [W_LO, W_LO[:, 3:].detach().requires_grad_()],
            b_O,
            [0, 3],
            O,
        ),
        "grouped_backward": (
            *one_behind_the_other(entries, False),
            [N, N],
            plain_BO,
            [plain_LO, plain_LO[:, 3:].contiguous()],
            [0, 3],
            True,
        ),
        "window_sums": ([y_BO, y_BO[:, 3:].detach().requires_grad_()], b_O, [0, 3], O),
        "sparse_decode_backward": (*entries, plain_BO, plain_LO),
        "decode_recon": (*values, W_LO, b_O, torch.randn(B, O), [3, 5]),
        "decoder_norms": (W_LO, [3, 5], False),
        "decoder_norms_backward": (*norms, plain_LO, *norms, [3, 5], True),
        "recon_loss": (y_BO, torch.randn(B, O), [3, 5]),
        "recon_loss_backward": (torch.ones(2), plain_BO, [3, 5]),
        "jumprelu": (h_BL, t_L, 2.0, True),
        "jumprelu_backward": (plain_BL, plain_BL, t_L.detach(), 2.0, False),
        "dense_penalty": (a_BL, n_L, lam_L, 4.0),
        "dense_penalty_backward": (g, a_BL.detach(), n_L.detach(), lam_L, 4.0),
        "sparse_penalty": (*values, n_L, lam_L, None),
        "sparse_penalty_backward": (g, *entries, n_L.detach(), lam_L, None),
        "pre_act": (h_BL, t_L, n_L, lam_L),
        "pre_act_backward": (g, plain_BL, t_L.detach(), n_L.detach(), lam_L),
    }
    of_stock_ops = {"window_sums"}
    return {
        name: (*arguments, *(("torch", []) if name in of_stock_ops else BACKEND)) for name, arguments in calls.items()
    }


@named
def test_every_registered_op_is_checked(name):
    assert set(kernel_names()) == set(op_calls())


@named
@pytest.mark.parametrize("op", list(op_calls()))
def test_opcheck(op, name):
    torch.library.opcheck(getattr(torch.ops.crosscode, op).default, op_calls()[op])


def encode(ops, encoder, x_BI, W_LI, b_L):
    if encoder == "aux_topk":
        return ops.aux_topk(x_BI, W_LI, b_L, torch.arange(L) % 2 == 0, K)
    return getattr(ops, encoder)(x_BI, W_LI, b_L, K)


def train_loss(ops, scheme, x_BI, W_LI, b_L, W_LO, b_O, t_L, target_BO):
    """Forward and loss of a training step of each scheme."""
    norms = ops.decoder_norms(W_LO, (3, 5), "sum")
    lam_L = torch.full_like(norms.n_L, 0.1)
    penalty = 0.0
    if scheme == "l1":
        latents = ops.encode_relu(x_BI, W_LI, b_L)
        penalty = ops.weighted_l1(latents, norms.n_L, lam_L)
    elif scheme == "jumprelu":
        latents = ops.encode_jumprelu(x_BI, W_LI, b_L, t_L, 2.0, "anthropic")
        penalty = ops.weighted_tanh(latents, norms.n_L, lam_L, 4.0)
        penalty = penalty + ops.pre_act_penalty(latents, t_L, norms.n_L, lam_L)
    else:
        latents = encode(ops, scheme, x_BI, W_LI, b_L)
        penalty = ops.weighted_tanh(latents, norms.n_L, lam_L, 4.0) + ops.weighted_l1(latents, norms.n_L, lam_L)
    y_BO = ops.sparse_decode(latents, W_LO, b_O)
    return ops.recon_loss(y_BO, target_BO, (3, 5)).loss + penalty


@named
@pytest.mark.parametrize("scheme", [*ENCODERS, "l1", "jumprelu"])
def test_a_compiled_training_step_gives_the_eager_loss_and_gradients(scheme, name):
    ops = resolve_backend(name, "cpu")
    losses, grads = [], []
    for compiled in (False, True):
        leaves = (*tensors(), torch.zeros(L, requires_grad=True))
        target_BO = torch.ones(B, O)

        def run(*leaves, target_BO=target_BO):
            return train_loss(ops, scheme, *leaves, target_BO)

        step = torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run
        loss = step(*leaves)
        loss.backward()
        losses.append(loss.detach())
        grads.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*losses)
    for eager, traced in zip(*grads, strict=True):
        assert (eager is None) == (traced is None)
        if eager is not None:
            torch.testing.assert_close(eager, traced, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_default_compiler_takes_a_step_too():
    ops = resolve_backend("torch", "cpu")
    leaves, target_BO = (*tensors(), torch.zeros(L, requires_grad=True)), torch.ones(B, O)
    step = torch.compile(lambda *leaves: train_loss(ops, "encode_topk", *leaves, target_BO), fullgraph=True)
    eager = train_loss(ops, "encode_topk", *leaves, target_BO)
    torch.testing.assert_close(step(*leaves), eager)


def test_latents_can_leave_a_compiled_function():
    ops = resolve_backend("torch", "cpu")
    x_BI, W_LI, b_L, *_ = tensors()
    encode_compiled = torch.compile(
        lambda x_BI: ops.encode_topk(x_BI, W_LI, b_L, K), fullgraph=True, backend="aot_eager"
    )
    latents = encode_compiled(x_BI)
    assert isinstance(latents, SparseLatents)
    assert torch.equal(latents.to_dense(), ops.encode_topk(x_BI, W_LI, b_L, K).to_dense())


@pytest.mark.parametrize("scheme", [*ENCODERS, "l1", "jumprelu"])
def test_two_runs_give_the_same_bits(backend, scheme):
    if scheme == "aux_topk" and backend.device != "cpu":
        pytest.skip("the dead mask of this test is on the CPU")
    runs = []
    for _ in range(2):
        leaves = [tensor.detach().to(backend.device).requires_grad_() for tensor in (*tensors(), torch.zeros(L))]
        loss = train_loss(backend.ops, scheme, *leaves, torch.ones(B, O, device=backend.device))
        loss.backward()
        runs.append([loss, *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@named
@pytest.mark.parametrize("scheme", [*ENCODERS, "l1", "jumprelu"])
def test_autocast_runs_products_in_half_precision_and_losses_in_float32(name, scheme):
    ops = resolve_backend(name, "cpu")
    leaves = (*tensors(), torch.zeros(L, requires_grad=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        latents = encode(ops, scheme, *leaves[:3]) if scheme in ENCODERS else ops.encode_relu(*leaves[:3])
        value = latents.value_N if isinstance(latents, SparseLatents) else latents.value_BL
        assert value.dtype == torch.bfloat16
        loss = train_loss(ops, scheme, *leaves, torch.ones(B, O))
    assert loss.dtype == torch.float32
    loss.backward()
    full = (*tensors(), torch.zeros(L, requires_grad=True))
    train_loss(ops, scheme, *full, torch.ones(B, O)).backward()
    for half, single in zip(leaves, full, strict=True):
        if single.grad is not None:
            assert half.grad.dtype == torch.float32
            cosine = torch.nn.functional.cosine_similarity(half.grad.flatten(), single.grad.flatten(), dim=0)
            assert cosine > 0.9


@named
@pytest.mark.parametrize("encoder", [*ENCODERS, "encode_jumprelu"])
def test_forward_mode_is_refused_rather_than_zero(encoder, name):
    ops = resolve_backend(name, "cpu")
    x_BI, W_LI, b_L, *_ = tensors()

    def output(x_BI):
        if encoder == "encode_jumprelu":
            return ops.encode_jumprelu(x_BI, W_LI, b_L, torch.zeros(L), 2.0, "gdm").to_dense()
        return encode(ops, encoder, x_BI, W_LI, b_L).to_dense()

    x_BI = x_BI.detach()
    with pytest.raises(NotImplementedError, match=r"no forward-mode derivative .* use backend='reference'"):
        torch.func.jvp(output, (x_BI,), (torch.ones_like(x_BI),))
    assert output(x_BI).any(), "and works as before outside"


@named
def test_forward_mode_is_refused_by_every_op_after_the_encoder(name):
    ops = resolve_backend(name, "cpu")
    x_BI, W_LI, b_L, W_LO, *_ = (tensor.detach() for tensor in tensors())
    latents = ops.encode_topk(x_BI, W_LI, b_L, K)
    calls = {
        "sparse_decode": lambda W: ops.sparse_decode(latents, W),
        "grouped_decode": lambda W: ops.grouped_decode([latents], [W], None, [0], O),
        "decoder_norms": lambda W: ops.decoder_norms(W, (3, 5), "sum").n_L,
        "recon_loss": lambda W: ops.recon_loss(W, torch.zeros_like(W), (3, 5)).loss,
        "weighted_l1": lambda W: ops.weighted_l1(latents, W.sum(1), torch.ones(L)),
    }
    for op, call in calls.items():
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            torch.func.jvp(call, (W_LO,), (torch.ones_like(W_LO),))
        assert call(W_LO).isfinite().all(), op
