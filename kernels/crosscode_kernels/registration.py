"""How a kernel becomes visible to PyTorch: `crosscode::<name>`, with a fake for tracing and a gradient formula.

A kernel is a plain function on tensors that knows nothing of autograd. It lies in a folder's `torch_impl.py`; another
backend has one of the same name and arguments in its own file there (`triton_impl.py`), imported when it is first asked for.
Kernels are handed contiguous, checked tensors and something to compute (B > 0, N > 0), and must be deterministic; indices are
int32. Gradients come back in the dtype of the tensor they belong to; sums and statistics are `acc_dtype`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from crosscode_kernels.backend import Backend

Kernel = Callable[..., Any]
Arguments = Any
"""The arguments of an op by name, `a.h_BL`; fields of a NamedTuple stand beside the others, `a.backend` is a `Backend`."""

_SCHEMA = {
    Tensor: "Tensor", Tensor | None: "Tensor?", int: "SymInt", float: "float", float | None: "float?", bool: "bool",
    list[int]: "int[]", list[Tensor]: "Tensor[]",
}  # fmt: skip
_KERNELS: dict[str, Kernel] = {}


def kernel_names() -> list[str]:
    """Names of all kernels that are registered as ops."""
    return sorted(_KERNELS)


@functools.cache
def kernel_of(name: str, backend: str, option: str = "") -> Kernel:
    """Kernel `name` of "torch" or "triton", or its variant for an option."""
    file = f"{backend}_{option or 'impl'}".removeprefix("" if not option else "torch_")
    module = importlib.import_module(_KERNELS[name].__module__.removesuffix("torch_impl") + file)
    return getattr(module, f"{name}_{option}" if option else name)


def define_op(
    kernel: Kernel,
    *,
    fake: Callable[[Arguments], Any],
    empty: Callable[[Arguments], Any] = lambda a: None,
    finish: Callable[[Arguments, Any], Any] = lambda a, result: result,
    extra: Mapping[str, Any] | None = None,
    variants: Sequence[str] = (),
    saved: Callable[[Arguments, Any], dict[str, Any]] | None = None,
    backward: Callable[..., dict[str, Any]] | None = None,
    n_results: int | None = None,
) -> Callable[..., Any]:
    """Register `crosscode::<name of the kernel>` and return it as a function of the kernel's arguments, those of `extra`
    (types by name, for what only backward needs), and `backend=`. The torch kernel's annotations are the schema.

    `empty` gives the result where there is nothing to compute, else None. `finish` makes the op's results (`n_results` of them)
    of the kernel's. `variants`: options for which a backend has another kernel, `NAME_OPTION` in `OPTION.py` (of Triton
    `triton_OPTION.py`). `saved` names what backward needs beside
    arguments that are no tensors; `backward(a, *grads)`, with `a.needs` the names of the arguments that want a gradient,
    returns gradients by name.
    """
    name, hints = kernel.__name__, get_type_hints(kernel)
    _KERNELS[name] = kernel
    result = hints.pop("return")
    groups = {argument: kind for argument, kind in hints.items() if hasattr(kind, "_fields")}
    flat: dict[str, Any] = {}
    for argument, kind in (hints | dict(extra or {})).items():
        flat |= get_type_hints(kind) if argument in groups else {argument: kind}
    n_results = n_results or len(get_args(result)) or 1
    schema = ", ".join(f"{_SCHEMA[kind]} {argument}" for argument, kind in flat.items())
    results = "Tensor" if n_results == 1 else f"({', '.join(['Tensor'] * n_results)})"
    tensors = {argument for argument, kind in flat.items() if kind in (Tensor, Tensor | None, list[Tensor])}

    def bind(values: tuple[Any, ...]) -> Arguments:
        *arguments, backend, options = values
        return SimpleNamespace(**dict(zip(flat, arguments, strict=True)), backend=Backend(backend, tuple(options)))

    def plain(result: Any) -> Any:
        return result if isinstance(result, Tensor) else tuple(result)

    def body(*values: Any) -> Any:
        a = bind(values)
        if (nothing := empty(a)) is not None:
            return plain(nothing)
        option = next((option for option in variants if option in a.backend.options), "")
        ready = {argument: contiguous(value) for argument, value in vars(a).items()}
        arguments = [
            groups[argument](*(ready[field] for field in groups[argument]._fields))
            if argument in groups
            else ready[argument]
            for argument in hints
        ]
        return plain(finish(a, kernel_of(name, a.backend.name, option)(*arguments)))

    op = torch.library.custom_op(
        f"crosscode::{name}", body, mutates_args=(), schema=f"({schema}, str backend, str[] options) -> {results}"
    )
    op.register_fake(lambda *values: plain(fake(bind(values))))
    if saved is not None and backward is not None:

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            a = bind(inputs)
            kept = saved(a, output)
            ctx.rest = {key: value for key, value in vars(a).items() if key not in tensors}
            leaves, ctx.kept = tree_flatten(kept)
            ctx.save_for_backward(*leaves)
            ctx.set_materialize_grads(False)

        def backward_of(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
            found: dict[str, Any] = {}
            if any(grad is not None for grad in grads):
                needs = {argument for argument, needed in zip(flat, ctx.needs_input_grad, strict=False) if _any(needed)}
                kept = tree_unflatten(ctx.saved_tensors, ctx.kept)
                found = backward(SimpleNamespace(**kept, **ctx.rest, needs=needs), *grads)
            # Where lists of tensors have gradients, PyTorch wants lists: it takes an empty one of options for one of them.
            of_options = [] if list[Tensor] in flat.values() and not ctx.rest["backend"].options else None
            nothing = {
                argument: [None] * len(needed)
                for (argument, kind), needed in zip(flat.items(), ctx.needs_input_grad, strict=False)
                if kind == list[Tensor]
            }
            return *(found.get(argument, nothing.get(argument)) for argument in flat), None, of_options

        op.register_autograd(backward_of, setup_context=setup_context)

    def call(*arguments: Any, backend: Backend) -> Any:
        values: list[Any] = []
        for argument in arguments:
            values.extend(argument) if isinstance(argument, tuple) else values.append(argument)
        refuse_tangents(name, values)
        return op(*values, backend.name, list(backend.options))

    return call


def refuse_tangents(name: str, values: Iterable[Any]) -> None:
    """Raise `NotImplementedError` in forward-mode differentiation, which would take a registered op for a constant."""
    if forward_ad._current_level < 0:  # the one way to ask that costs nothing
        return
    tensors = (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor) and leaf.is_floating_point())
    if any(forward_ad.unpack_dual(value).tangent is not None for value in tensors):
        raise NotImplementedError(
            f"{name}: no forward-mode derivative (torch.func.jvp, jacfwd); use backend='reference', or torch.func.vjp"
        )


def contiguous(value: Any) -> Any:
    """Kernels read rows: they are handed contiguous tensors."""
    if isinstance(value, list):
        return [contiguous(one) for one in value]
    return value.contiguous() if isinstance(value, Tensor) else value


def _any(needed: bool | Sequence[bool]) -> bool:
    """Of a list of tensors, whether one is meant."""
    return needed if isinstance(needed, bool) else any(needed)


def like(tensor: Tensor) -> Tensor:
    """What a kernel returns for this tensor: its shape and dtype, contiguous, uninitialised."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format)


def grad_or_zeros(grad: Tensor | None, like: Tensor) -> Tensor:
    """The gradient of an output that may not have been used."""
    return torch.zeros_like(like) if grad is None else grad.contiguous()
