"""Every op of an op set on tensors of a real size, ready to be called: what `bench_ops.py` times.

Axes: B tokens · I flattened input dims · O flattened output dims · L latents · X crosscoding positions
N stored entries · k entries per token.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch
from bare_step import Case, make_params
from crosscode_kernels import DenseLatents, OpSet
from crosscode_kernels.opset import find_ops
from crosscode_kernels.sparse import Latents
from torch import Tensor

DEAD_FRACTION = 0.05


class Inputs:
    """The tensors of one step: parameters as in the bench of the training step, and a batch of its own.

    Named as the arguments of ops: `Op` finds them by these names. `latents` are those of a TopK encode in the form that the op
    set prefers, `dense` those of a JumpReLU.
    """

    eps, ste, mode, c = 2.0, "anthropic", "sum", 4.0

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
        self.residual_BO = self.target_BO
        self.t_L = torch.full((case.L,), 0.1, device=device, dtype=dtype).requires_grad_()
        self.lambda_L = torch.full((case.L,), 0.1, device=device)
        self.dead_mask_L = torch.rand(case.L, generator=generator).to(device) < DEAD_FRACTION
        self.dead_mask_L[0] = True  # at small sizes as well
        self.threshold = torch.tensor(0.5, device=device)
        with torch.no_grad():
            self.n_L = ops.decoder_norms(self.W_dec_LO, self.segments, "sum").n_L
            h_BL = ops.preacts(self.x_BI, self.W_enc_LI, self.b_enc_L)
            latents = ops.encode_topk(self.x_BI, self.W_enc_LI, self.b_enc_L, case.k)
        self.scale_L = self.n_L
        self.n_L = self.n_L.clone().requires_grad_()
        self.h_BL = h_BL.detach().requires_grad_()
        self.a_BL = h_BL.detach().relu().requires_grad_()
        self.latents = _as_leaf(latents)
        self.value = _value(self.latents)
        self.dense = DenseLatents(self.a_BL)
        self.first_S, self.n_out = [0, case.O], 2 * case.O

    @property
    def latents_S(self) -> list[Latents]:
        return [self.latents] * 2

    @property
    def W_S(self) -> list[Tensor]:
        return [self.W_dec_LO] * 2


def _value(latents: Latents) -> Tensor:
    return latents.value_BL if isinstance(latents, DenseLatents) else latents.value_N


def _as_leaf(latents: Latents) -> Latents:
    """The same latents, their value a leaf, their transpose at hand as the encoder leaves it."""
    if isinstance(latents, DenseLatents):
        return DenseLatents(latents.value_BL.detach().requires_grad_())
    return replace(latents.with_transpose(), value_N=latents.value_N.detach().requires_grad_())


class Op:
    """An op on `Inputs`: each argument is the input of its name, or of that in `instead`. What has a default keeps it, but for
    inputs that want a gradient. `leaves`: the inputs whose gradients a training step wants."""

    def __init__(self, name: str, instead: dict[str, str | None]) -> None:
        self.name = name
        parameters = inspect.signature(find_ops()[name]).parameters.values()
        taken = {one.name: one.name for one in parameters if one.default is one.empty or one.name in LEAVES}
        self.taken: dict[str, str | None] = taken | instead
        wanted = self.taken.values() if name not in NO_GRADIENT else ()
        self.leaves = tuple(LEAVES[taken] for taken in wanted if taken in LEAVES)

    def forward(self, ops: OpSet, t: Inputs) -> Any:
        if missing := [taken for taken in self.taken.values() if taken and not hasattr(t, taken)]:
            raise LookupError(
                f"{self.name}: the benches have no input called {', '.join(missing)}; see `Inputs` in {__file__}"
            )
        return getattr(ops, self.name)(**{name: taken and getattr(t, taken) for name, taken in self.taken.items()})


LEAVES = {
    **{name: name for name in ("W_enc_LI", "b_enc_L", "W_dec_LO", "b_dec_O", "y_BO", "h_BL", "t_L", "n_L")},
    **{"latents": "value", "latents_S": "value", "dense": "a_BL", "W_S": "W_dec_LO"},
}
"""Inputs that want a gradient in a training step, and the tensor that gets it."""
NO_GRADIENT = ("encode_threshold",)
"""Ops for inference."""
NOT_TIMED = {
    "preacts": "the GEMM of every encode",
    "pre_act_penalty": "a dot product, after encode_jumprelu",
    "nested_decode": "sparse_decode of as many entries, and sums",
    "step_l0": "counts of what encode_jumprelu has kept",
}
"""Ops without a case, and why."""
VARIANTS: dict[str, dict[str, str | None]] = {
    "encode_batch_topk by norm": {"rank_scale_L": "scale_L"},
    "grouped_decode": {"b_dec_O": None},
    "weighted_l1 dense": {"latents": "dense"},
    "weighted_tanh dense": {"latents": "dense"},
}
"""Further cases of some ops, and other inputs than those of the arguments' names."""


def find_cases() -> dict[str, Op]:
    """Every op that the package has, and the variants: a new op needs no line if its arguments are named as `Inputs` are."""
    named = {name: {} for name in find_ops() if name not in NOT_TIMED} | VARIANTS
    return {name: Op(name.split()[0], instead) for name, instead in named.items()}


OPS = find_cases()


def output(result: Any) -> Tensor:
    """The tensor of an op's result that carries the gradient: of several `loss` or `n_L`, or the first."""
    named = next((name for name in ("loss", "n_L") if hasattr(result, name)), None)
    first = getattr(result, named) if named else result[0] if isinstance(result, tuple) else result
    return first if isinstance(first, Tensor) else _value(first)


def call(op: Op, ops: OpSet, inputs: Inputs, backward: bool) -> Any:
    """The op's result, or the gradients of its leaves for a gradient of ones."""
    if not backward:
        with torch.no_grad():
            return op.forward(ops, inputs)
    found = output(op.forward(ops, inputs))
    return torch.autograd.grad(found, [getattr(inputs, name) for name in op.leaves], torch.ones_like(found))
