"""Fraction of variance unexplained.

Axes: B tokens · D width · Xo output crosscoding dims · X = flattened Xo.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crosscode.errors import InputError


class FvuAccumulator:
    """Fraction of variance unexplained: `sum ||y - yhat||^2 / sum ||y - mean(y)||^2`, sums over a whole data set.

    Sums are float64 where the device has it: `sum ||y - mean||^2` is taken as `sum ||y||^2 - ||sum y||^2 / N`.
    """

    def __init__(self, out_dims: tuple[int, ...]):
        self.out_dims = out_dims
        self.n_tokens = 0
        self._error_X: Tensor | None = None
        self._square_X: Tensor | None = None
        self._sum_XD: Tensor | None = None

    @torch.no_grad()
    def update(self, target_BXoDo: Tensor, output_BXoDo: Tensor) -> None:
        # MPS has no float64.
        dtype = torch.float32 if target_BXoDo.device.type == "mps" else torch.float64
        y_BXD = target_BXoDo.reshape(target_BXoDo.shape[0], -1, target_BXoDo.shape[-1]).to(dtype)
        error_BXD = output_BXoDo.reshape(y_BXD.shape).to(dtype) - y_BXD
        self.n_tokens += y_BXD.shape[0]
        self._error_X = _plus(self._error_X, error_BXD.square().sum((0, 2)))
        self._square_X = _plus(self._square_X, y_BXD.square().sum((0, 2)))
        self._sum_XD = _plus(self._sum_XD, y_BXD.sum(0))

    def variance_X(self) -> Tensor:
        """`sum ||y - mean(y)||^2` per position."""
        if self._sum_XD is None or self._square_X is None:
            raise InputError("evaluation: no tokens were seen; is the held-out data empty?")
        return self._square_X - self._sum_XD.square().sum(-1) / self.n_tokens

    def fvu_Xo(self) -> Tensor:
        """FVU per crosscoding position."""
        variance_X = self.variance_X()
        assert self._error_X is not None
        return (self._error_X / variance_X).reshape(self.out_dims)

    def fvu(self) -> float:
        """FVU in total: both sums run over the positions as well."""
        variance_X = self.variance_X()
        assert self._error_X is not None
        return float(self._error_X.sum() / variance_X.sum())


def _plus(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total + more
