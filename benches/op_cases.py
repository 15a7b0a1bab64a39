"""Every op of an op set on tensors of a real size, ready to be called: what `bench_ops.py` times.

Axes: B tokens · I flattened input dims · O flattened output dims · L latents · X crosscoding positions
N stored entries · k entries per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from crosscode_kernels import DenseLatents, OpSet
from crosscode_kernels.sparse import Latents
from torch import Tensor
from train_step import Case, make_params

DEAD_FRACTION = 0.05
C = 4.0


class Inputs:
    """The tensors of one step: parameters as in the bench of the training step, and a batch of its own.

    `sparse` are the latents of a TopK encode in the form that the op set prefers, `dense` those of a JumpReLU.
    """

    def __init__(self, case: Case, ops: OpSet, device: str, dtype: torch.dtype, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        self.case, self.k = case, case.k
        self.x_BI = normal(case.B, case.I)
        params = make_params(replace(case, scheme="topk", l0=0.0), self.x_BI.float().cpu())
        leaves = {name: tensor.detach().to(device, dtype).requires_grad_() for name, tensor in params.items()}
        self.W_enc_LI, self.b_enc_L = leaves["W_enc_LI"], leaves["b_enc_L"]
        self.W_dec_LO, self.b_dec_O = leaves["W_dec_LO"], leaves["b_dec_O"]
        self.segments = [case.O // case.segments] * case.segments
        self.target_BO, self.y_BO = normal(case.B, case.O), normal(case.B, case.O).requires_grad_()
        self.t_L = torch.full((case.L,), 0.1, device=device, dtype=dtype).requires_grad_()
        self.lambda_L = torch.full((case.L,), 0.1, device=device)
        self.dead_L = torch.rand(case.L, generator=generator).to(device) < DEAD_FRACTION
        self.dead_L[0] = True  # at small sizes as well
        self.threshold = torch.tensor(0.5, device=device)
        with torch.no_grad():
            self.n_L = ops.decoder_norms(self.W_dec_LO, self.segments, "sum").n_L
            h_BL = ops.preacts(self.x_BI, self.W_enc_LI, self.b_enc_L)
            latents = ops.encode_topk(self.x_BI, self.W_enc_LI, self.b_enc_L, case.k)
        self.n_L.requires_grad_()
        self.h_BL = h_BL.detach().requires_grad_()
        self.a_BL = h_BL.detach().relu().requires_grad_()
        self.sparse = _as_leaf(latents)
        self.value = _value(self.sparse)
        self.dense = DenseLatents(self.a_BL)


def _value(latents: Latents) -> Tensor:
    return latents.value_BL if isinstance(latents, DenseLatents) else latents.value_N


def _as_leaf(latents: Latents) -> Latents:
    """The same latents, their value a leaf, their transpose at hand as the encoder leaves it."""
    if isinstance(latents, DenseLatents):
        return DenseLatents(latents.value_BL.detach().requires_grad_())
    return replace(latents.with_transpose(), value_N=latents.value_N.detach().requires_grad_())


class Op(NamedTuple):
    """`forward(ops, t)` yields tensors; `leaves` are the inputs whose gradients a training step wants."""

    forward: Callable[[OpSet, Inputs], Any]
    leaves: tuple[str, ...] = ()


_ENCODER = ("W_enc_LI", "b_enc_L")
OPS: dict[str, Op] = {
    "encode_topk": Op(lambda ops, t: ops.encode_topk(t.x_BI, t.W_enc_LI, t.b_enc_L, t.k), _ENCODER),
    "encode_batch_topk": Op(lambda ops, t: ops.encode_batch_topk(t.x_BI, t.W_enc_LI, t.b_enc_L, t.k), _ENCODER),
    "encode_batch_topk by norm": Op(
        lambda ops, t: ops.encode_batch_topk(t.x_BI, t.W_enc_LI, t.b_enc_L, t.k, t.n_L.detach()), _ENCODER
    ),
    "encode_groupmax": Op(lambda ops, t: ops.encode_groupmax(t.x_BI, t.W_enc_LI, t.b_enc_L, t.k), _ENCODER),
    "encode_threshold": Op(lambda ops, t: ops.encode_threshold(t.x_BI, t.W_enc_LI, t.b_enc_L, t.threshold)),
    "aux_topk": Op(lambda ops, t: ops.aux_topk(t.x_BI, t.W_enc_LI, t.b_enc_L, t.dead_L, t.k), _ENCODER),
    "dead_decode": Op(
        lambda ops, t: ops.dead_decode(t.x_BI, t.W_enc_LI, t.b_enc_L, t.dead_L, t.k, t.W_dec_LO),
        (*_ENCODER, "W_dec_LO"),
    ),
    "encode_relu": Op(lambda ops, t: ops.encode_relu(t.x_BI, t.W_enc_LI, t.b_enc_L), _ENCODER),
    "encode_jumprelu": Op(
        lambda ops, t: ops.encode_jumprelu(t.x_BI, t.W_enc_LI, t.b_enc_L, t.t_L, 2.0, "anthropic"), (*_ENCODER, "t_L")
    ),
    "sparse_decode": Op(
        lambda ops, t: ops.sparse_decode(t.sparse, t.W_dec_LO, t.b_dec_O), ("value", "W_dec_LO", "b_dec_O")
    ),
    "grouped_decode": Op(
        lambda ops, t: ops.grouped_decode([t.sparse] * 2, [t.W_dec_LO] * 2, None, [0, t.case.O], 2 * t.case.O),
        ("value", "W_dec_LO"),
    ),
    "decode_recon_loss": Op(
        lambda ops, t: ops.decode_recon_loss(t.sparse, t.W_dec_LO, t.b_dec_O, t.target_BO, t.segments).loss,
        ("value", "W_dec_LO", "b_dec_O"),
    ),
    "decoder_norms": Op(lambda ops, t: ops.decoder_norms(t.W_dec_LO, t.segments, "sum").n_L, ("W_dec_LO",)),
    "recon_loss": Op(lambda ops, t: ops.recon_loss(t.y_BO, t.target_BO, t.segments).loss, ("y_BO",)),
    "jumprelu": Op(lambda ops, t: ops.jumprelu(t.h_BL, t.t_L, 2.0, "anthropic"), ("h_BL", "t_L")),
    "pre_act": Op(lambda ops, t: ops.pre_act(t.h_BL, t.t_L, t.n_L, t.lambda_L), ("h_BL", "t_L", "n_L")),
    "weighted_l1 dense": Op(lambda ops, t: ops.weighted_l1(t.dense, t.n_L, t.lambda_L), ("a_BL", "n_L")),
    "weighted_l1 sparse": Op(lambda ops, t: ops.weighted_l1(t.sparse, t.n_L, t.lambda_L), ("value", "n_L")),
    "weighted_tanh dense": Op(lambda ops, t: ops.weighted_tanh(t.dense, t.n_L, t.lambda_L, C), ("a_BL", "n_L")),
    "weighted_tanh sparse": Op(lambda ops, t: ops.weighted_tanh(t.sparse, t.n_L, t.lambda_L, C), ("value", "n_L")),
}
NOT_TIMED = {
    "preacts": "the GEMM of every encode",
    "pre_act_penalty": "a dot product, after encode_jumprelu",
    "nested_decode": "sparse_decode of as many entries, and sums",
    "step_l0": "counts of what encode_jumprelu has kept",
}
"""Methods of an op set that have no case of their own, and why."""


def outputs(result: Any) -> list[Tensor]:
    """The tensors of an op's result that carry a gradient."""
    if isinstance(result, Tensor):
        return [result]
    return list(result) if isinstance(result, tuple) else [_value(result)]


def call(op: Op, ops: OpSet, inputs: Inputs, backward: bool) -> Any:
    """The op's result, or the gradients of its leaves for a gradient of ones."""
    if not backward:
        with torch.no_grad():
            return op.forward(ops, inputs)
    found = outputs(op.forward(ops, inputs))
    return torch.autograd.grad(
        found, [getattr(inputs, name) for name in op.leaves], [torch.ones_like(tensor) for tensor in found]
    )
