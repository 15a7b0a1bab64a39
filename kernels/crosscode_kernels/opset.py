"""Every op, found by its folder, and op sets that bind them all to one backend."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from crosscode_kernels.backend import AnyBackend, Backend, resolve

_PACKAGE = "crosscode_kernels"
_OPS: dict[str, Callable[..., Any]] = {}
Door = TypeVar("Door", bound=Callable[..., Any])


def door(function: Door) -> Door:
    """Decorator of an op's public function, in the `__init__` of its folder. Its last argument is `backend`, by keyword."""
    if _OPS.get(function.__name__, function).__module__ != function.__module__:
        raise ValueError(f"op {function.__name__!r} is there twice: {_OPS[function.__name__].__module__} has it too")
    _OPS[function.__name__] = function
    return function


def find_ops() -> dict[str, Callable[..., Any]]:
    """The doors of all folders of this package, by name: nothing else lists them."""
    for folder in pkgutil.iter_modules(importlib.import_module(_PACKAGE).__path__):
        if folder.ispkg:
            importlib.import_module(f"{_PACKAGE}.{folder.name}")
    return _OPS


class OpSet:
    """The ops of all doors as methods, bound to `backend`: `ops.encode_topk(x_BI, W_enc_LI, b_enc_L, k)`.

    All are differentiable where a gradient is defined. Encoders return `Latents`; the value of a sparse one carries the gradient.
    A latent whose value is 0 is not active, however it is stored. Ties: the lowest index wins, in every backend.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = replace(backend, said={})
        for name, op in find_ops().items():
            setattr(self, name, partial(op, backend=self.backend))

    @property
    def name(self) -> str:
        return self.backend.name

    def total_norm(self, norms_P: Tensor, params: Sequence[Tensor]) -> Tensor:
        """The 2-norm of all gradients from `norms_P`, those of the parameters `params`."""
        return torch.linalg.vector_norm(norms_P)

    def rows_of(self, value_R: Tensor, latents_N: Tensor) -> Tensor:
        """Of what has a row for each row of the weights, those of these latents."""
        return value_R[latents_N]

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Callable[..., Any]: ...


def resolve_backend(backend: AnyBackend, device: torch.device | str, dtype: torch.dtype = torch.float32) -> OpSet:
    """The op set of `backend`; see `backend.resolve`."""
    return OpSet(resolve(backend, device, dtype))
