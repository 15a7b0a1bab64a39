"""Repairs to Triton's interpreter, for tests. Nothing here runs unless it is called.

`repaired_interpreter()` is a context in which

- nested device functions do not patch `triton.language` again at every call: the outermost launch has done so (half the
  time of an interpreted kernel goes there otherwise);
- fp32 to bf16 rounds to nearest even, as every GPU does, where the interpreter of Triton 3.9 truncates;
- `order`, where given, decides in which order the programs of a grid run.

`checked_bounds()` is a context in which a load, store or atomic outside of the tensors that a launch was given raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Index = tuple[int, int, int]
GridOrder = Callable[[list[Index]], list[Index]]


def _round_to_bfloat16(data: np.ndarray) -> np.ndarray:
    """Bits of the nearest bf16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(data).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(data), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def _cast_with_rounding(cast: Callable[..., Any]) -> Callable[..., Any]:
    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return interpreter.TensorHandle(_round_to_bfloat16(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    return cast_impl


def _patch_once(patch_lang: Callable[..., Any]) -> Callable[..., Any]:
    """Patch each language module once per outermost launch; its `restore` undoes the nested patches too."""
    scopes: list[Any] = []
    patched: set[int] = set()

    class _NestedScope:
        def restore(self) -> None:
            pass

    class _OuterScope:
        def restore(self) -> None:
            while scopes:
                scopes.pop().restore()
            patched.clear()

    def patch(fn: Any) -> Any:
        outermost = not scopes
        modules = {id(value) for value in fn.__globals__.values() if value is tl or value is tl.core}
        if outermost or not modules <= patched:
            scopes.append(patch_lang(fn))
            patched.update(modules)
        return _OuterScope() if outermost else _NestedScope()

    return patch


def _ordered(set_grid_idx: Callable[..., None], order: GridOrder) -> Callable[..., None]:
    state: dict[str, Any] = {}

    def set_idx(self: Any, x: int, y: int, z: int) -> None:
        dims = tuple(self.grid_dim)
        if (x, y, z) == (0, 0, 0):
            plain = [(i, j, k) for i in range(dims[0]) for j in range(dims[1]) for k in range(dims[2])]
            state["order"] = iter(order(plain))
        set_grid_idx(self, *next(state["order"]))

    return set_idx


@contextmanager
def repaired_interpreter(order: GridOrder | None = None) -> Iterator[None]:
    """See the module's docstring. `order` maps the list of program indices to a permutation of it."""
    builder = interpreter.InterpreterBuilder
    saved = interpreter._patch_lang, builder.cast_impl, builder.set_grid_idx
    # The module-level function is used where a context is nested in another; it is wrapped once.
    if not getattr(interpreter._patch_lang, "patches_once", False):
        interpreter._patch_lang = _patch_once(saved[0])
        interpreter._patch_lang.patches_once = True  # pyright: ignore[reportFunctionMemberAccess]
        builder.cast_impl = _cast_with_rounding(saved[1])
    if order is not None:
        builder.set_grid_idx = _ordered(saved[2], order)
    try:
        yield
    finally:
        interpreter._patch_lang, builder.cast_impl, builder.set_grid_idx = saved


class _Extents:
    """Byte ranges of a launch's tensors."""

    def __init__(self) -> None:
        self.starts = self.ends = np.zeros(0, np.uint64)

    def set(self, tensors: list[Any]) -> None:
        ranges = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors if t.numel())
        self.starts = np.array([start for start, _ in ranges], np.uint64)
        # Views of one storage may nest: what counts is the furthest end so far.
        self.ends = np.maximum.accumulate(np.array([end for _, end in ranges], np.uint64))

    def check(self, what: str, pointers: Any, mask: Any) -> None:
        active = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        addresses = pointers.data[active]
        size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        place = np.searchsorted(self.starts, addresses, side="right")
        inside = (place > 0) & (addresses + np.uint64(size) <= self.ends[np.maximum(place - 1, 0)])
        if not inside.all():
            raise IndexError(f"{what} of {int((~inside).sum())} element(s) outside of the kernel's tensors")


@contextmanager
def checked_bounds() -> Iterator[None]:
    """See the module's docstring. Tensors that a kernel is given must be contiguous."""
    from crosscode_kernels.triton_common.launch import reached

    builder, executor, extents = interpreter.InterpreterBuilder, interpreter.GridExecutor, _Extents()
    saved = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw, executor.__call__
    load, store, atomic, run = saved

    def checked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        extents.check("load", ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def checked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        extents.check("store", ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    def checked_atomic(self: Any, op: Any, ptr: Any, value: Any, mask: Any, *rest: Any) -> Any:
        extents.check("atomic", ptr, mask)
        return atomic(self, op, ptr, value, mask, *rest)

    def run_in_extents(self: Any, *args: Any, **kwargs: Any) -> Any:
        extents.set([arg for arg in (*args, *kwargs.values(), *reached) if hasattr(arg, "data_ptr")])
        return run(self, *args, **kwargs)

    builder.create_masked_load, builder.create_masked_store = checked_load, checked_store
    builder.create_atomic_rmw, executor.__call__ = checked_atomic, run_in_extents
    try:
        yield
    finally:
        builder.create_masked_load, builder.create_masked_store = saved[:2]
        builder.create_atomic_rmw, executor.__call__ = saved[2:]
