"""Which backend computes: a name and options, parsed once, and the rule that picks one.

`reference`: dense and obvious, what the others are tested against. `torch`: the sparse formulation in stock PyTorch ops, for
CPU, MPS and any GPU without Triton. `triton`: fused kernels for CUDA and ROCm, and their interpreter for tests on the CPU.
"""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from crosscode_kernels.checks import FLOATS
from crosscode_kernels.sparse import Latents

_logger = logging.getLogger("crosscode_kernels")

BackendName = Literal[
    "auto",
    "triton",
    "torch",
    "reference",
    "triton:deferred",
    "triton:screened",
    "triton:screened+deferred",
    "torch:screened",
    "torch:rows",
    "torch:screened+rows",
]
"""How a user spells a backend; what follows a colon are options."""
SPARSE_BELOW = 0.12
"""Share of active latents under which sparse products are taken on a CPU where it was not measured: they take 0.5 to 0.7 of a
step's time at this share and all of it at 0.22 (two cores, widths 512 to 3072, L 4096 and 8192)."""


@dataclass(frozen=True)
class Backend:
    """`name`: "triton", "torch" or "reference" ("auto" until it is resolved). `options`, of torch and triton:

    "screened": pre-activations of `encode_topk` are screened in bfloat16 and only candidates computed in full; rows where that
    is not proven to give the same selection are done densely. A speed-up where bfloat16 products are fast. float32 only.

    Of torch:

    "rows": weight gradients of sparse latents are sparse COO tensors over the touched rows, for `RowSparseAdam`, where a batch
    touches few. Eager only: while compiling they are dense.

    And of triton: "deferred": they are not computed before the optimizer does (`FusedAdam`), or somebody else looks at them.
    """

    name: str
    options: tuple[str, ...] = ()
    sparse_below: float = SPARSE_BELOW
    """Of torch on a CPU: the share of latents (of a ReLU, a JumpReLU, of the dead) under which products are sparse."""
    capacity: float = 0.0
    """Of triton: the share of a ReLU's or JumpReLU's pre-activations for whose entries there is room; products are sparse in the
    batches that fit (`crosscode_kernels.capacity`). 0: they are dense."""
    said: dict[str, str] = field(default_factory=dict, compare=False, repr=False)
    """What ops have said in the log last, so that they say only what is new."""

    @classmethod
    def parse(cls, spelled: AnyBackend) -> Backend:
        """From how a user spells it. ValueError for an unknown name."""
        if isinstance(spelled, Backend):
            return spelled
        if spelled not in get_args(BackendName):
            raise ValueError(f"backend is {spelled!r}; must be one of {', '.join(get_args(BackendName))}")
        name, _, options = spelled.partition(":")
        return cls(name, tuple(options.split("+")) if options else ())

    def __str__(self) -> str:
        return f"{self.name}:{'+'.join(self.options)}" if self.options else self.name

    @property
    def is_row_sparse(self) -> bool:
        """Whether weight gradients are sparse over rows. Their shapes depend on the data, so never while tracing."""
        return "rows" in self.options and not torch.compiler.is_compiling()

    @property
    def is_deferred(self) -> bool:
        """Whether weight gradients are handed on without being computed; not where gradients of them are wanted."""
        return "deferred" in self.options and not torch.compiler.is_compiling() and not torch.is_grad_enabled()

    @property
    def has_capacity(self) -> bool:
        """Whether entries are looked for; not while tracing, as ops that do are for eager execution."""
        return self.name == "triton" and self.capacity > 0 and not torch.compiler.is_compiling()

    def unavailable_reason(self, device: torch.device, dtype: torch.dtype) -> str:
        """Why this backend cannot serve tensors of `dtype` on `device`; "" where it can."""
        if dtype not in FLOATS:
            return f"dtype {dtype} is not float16, bfloat16, float32 or float64"
        if "screened" in self.options and (dtype != torch.float32 or (device.type != "cpu" and self.name == "torch")):
            return f"screened encoding is for float32{' on the CPU' if self.name == 'torch' else ''}"
        if self.name != "triton":
            return ""
        try:
            triton_launch = importlib.import_module("crosscode_kernels.triton_common.launch")
        except ImportError as error:
            return f"triton cannot be imported ({error})"
        return triton_launch.unavailable_reason(device, dtype)


AnyBackend = Backend | BackendName
_FASTEST_FIRST = (Backend("triton"), Backend("torch"), Backend("reference"))
_announced: set[tuple[Backend, str, torch.dtype]] = set()


class BackendStatus(NamedTuple):
    """Whether `name` works here; `reason` says why not ("" where it does)."""

    name: str
    available: bool
    reason: str


def available_backends(
    device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> list[BackendStatus]:
    """Every backend, fastest first, with the reason where one is not available on `device` (default: the accelerator
    if there is one, else the CPU)."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    reasons = {backend.name: backend.unavailable_reason(device, dtype) for backend in _FASTEST_FIRST}
    return [BackendStatus(name, not reason, reason) for name, reason in reasons.items()]


def resolve(backend: AnyBackend, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Backend:
    """The backend that serves `device` and `dtype`: `auto` picks the fastest that does and logs the choice once.

    Raises ValueError for an unknown name, and for a backend that was asked for by name and cannot serve the request.
    """
    device, wanted = torch.device(device), Backend.parse(backend)
    if wanted.name != "auto":
        if reason := wanted.unavailable_reason(device, dtype):
            raise ValueError(f"backend {str(wanted)!r} is not available on {device} with {dtype}: {reason}")
        return wanted
    refused: list[str] = []
    for candidate in _FASTEST_FIRST:
        reason = candidate.unavailable_reason(device, dtype)
        if not reason and candidate.name == "triton" and device.type == "cpu":
            reason = "its interpreter is for tests"
        if not reason:
            break
        refused.append(f"{candidate}: {reason}")
    else:
        raise ValueError(f"no backend serves {device} with {dtype}: {'; '.join(refused)}")
    if (candidate, str(device), dtype) not in _announced:
        _announced.add((candidate, str(device), dtype))
        why = "; ".join(refused) or f"the fastest, and its kernels serve {torch.cuda.get_device_name(device)}"
        _logger.info("backend auto: %s on %s with %s (%s)", candidate, device, dtype, why)
    return replace(candidate, sparse_below=wanted.sparse_below, capacity=wanted.capacity)


def backend_for(backend: AnyBackend, like: Tensor | Latents) -> Backend:
    """What an op was asked to run on: a backend passes through, a name is resolved for the tensor at hand."""
    if isinstance(backend, Backend):
        return backend
    tensor = like if isinstance(like, Tensor) else like.value
    return resolve(backend, tensor.device, tensor.dtype)
