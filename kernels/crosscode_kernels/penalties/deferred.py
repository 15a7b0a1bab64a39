"""A penalty's gradient to dense latents that is not computed yet: it is elementwise, so that the encoder's own pass can take it.

Axes: B tokens · L latents.

`PenaltyGrad` passes through autograd as a gradient does; a dense gradient may be added to it. The backward of the encoder that
made the latents computes it on its way (`taken`); everything else that looks at it gets an ordinary tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_aten = torch.ops.aten


class PenaltyTerm(NamedTuple):
    """What `dense_penalty_backward` takes beside the latents; nothing where there is no penalty."""

    g: Tensor | None = None
    n_L: Tensor | None = None
    lambda_L: Tensor | None = None
    c: float | None = None


class _Pending:
    """What views share. Once computed `rest_BL` is all of it."""

    def __init__(self, term: PenaltyTerm, compute: Callable[..., Tensor], rest_BL: Tensor | None) -> None:
        self.term, self.compute, self.rest_BL = term, compute, rest_BL


class PenaltyGrad(Tensor):
    """`d penalty / d a_BL`, and a dense gradient besides it (None: zero)."""

    a_BL: Tensor
    pending: _Pending

    @staticmethod
    def __new__(cls, a_BL: Tensor, pending: _Pending) -> PenaltyGrad:
        grad = Tensor._make_wrapper_subclass(cls, a_BL.shape, dtype=a_BL.dtype, device=a_BL.device)
        grad.a_BL, grad.pending = a_BL, pending
        return grad

    @classmethod
    def of(
        cls, a_BL: Tensor, term: PenaltyTerm, compute: Callable[..., Tensor], rest_BL: Tensor | None = None
    ) -> PenaltyGrad:
        """`compute(g, a_BL, n_L, lambda_L, c)` is the gradient without the rest."""
        return cls(a_BL, _Pending(term, compute, rest_BL))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"PenaltyGrad({tuple(self.shape)}, {self.dtype})"

    def dense(self) -> Tensor:
        """An ordinary tensor; computed once."""
        pending = self.pending
        if pending.term.g is not None:
            da_BL = pending.compute(pending.term.g, self.a_BL, *pending.term[1:])
            pending.rest_BL = da_BL if pending.rest_BL is None else da_BL.add_(pending.rest_BL)
            pending.term = PenaltyTerm()
        assert pending.rest_BL is not None
        return pending.rest_BL

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (_aten.detach.default, _aten.alias.default):
            return cls(args[0].a_BL, args[0].pending)
        if func is _aten.add.Tensor and not kwargs and all(isinstance(arg, Tensor) for arg in args):
            one, other = args if isinstance(args[0], PenaltyGrad) else args[::-1]
            other = other.dense() if isinstance(other, PenaltyGrad) else other
            if other.shape == one.shape and other.dtype == one.dtype:
                term, compute, rest_BL = vars(one.pending).values()
                return cls.of(one.a_BL, term, compute, other if rest_BL is None else rest_BL + other)
        plain = tree_map_only(PenaltyGrad, lambda one: one.dense(), (args, kwargs))
        result = func(*plain[0], **plain[1])
        return args[0] if func._schema.name.endswith("_") and isinstance(args[0], PenaltyGrad) else result


def taken(grad_BL: Tensor, a_BL: Tensor) -> tuple[Tensor | None, PenaltyTerm]:
    """A gradient of the encoder's result `a_BL` in two parts, the second of them not computed; that of other latents is."""
    if not isinstance(grad_BL, PenaltyGrad):
        return grad_BL, PenaltyTerm()
    if grad_BL.a_BL.data_ptr() != a_BL.data_ptr():
        return grad_BL.dense(), PenaltyTerm()
    return grad_BL.pending.rest_BL, grad_BL.pending.term
