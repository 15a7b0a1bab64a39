"""A stand-in for CUDA graphs on CPU tensors, which is as blind as they are: every op that a function dispatches is recorded with
the memory that it touched and with Python's numbers as they were, and launched again on the same memory.

What a graph would not see, a replay here does not see either: a number that changed in Python, a tensor that lies elsewhere
since. As on a device, a capture runs nothing (what was written is put back), and refuses ops that wait for a value or whose
result has a size that depends on one. Seen are ops below autograd, the library's own among them; not seen are reads that
PyTorch does not dispatch (`tolist`, `numpy`), which the CPU's own paths use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

T = TypeVar("T")
WAITS = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero", "aten::unique_dim",
    "aten::_unique2", "aten::unique_consecutive", "aten::_coalesce", "aten::bincount",
}  # fmt: skip
"""Ops that wait for a device, by name (or name and overload)."""


class GraphDouble:
    """What a trainer takes as its `capture`. `n_captures` and `n_replays` count; `events` has the names of calls, in order."""

    def __init__(self) -> None:
        self.events: list[str] = []

    @property
    def n_captures(self) -> int:
        return self.events.count("capture")

    @property
    def n_replays(self) -> int:
        return self.events.count("replay")

    def aside(self, call: Callable[[], T]) -> T:
        """As it is: there is one stream."""
        self.events.append("aside")
        return call()

    def capture(self, call: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """The result, whose tensors a replay fills, and what replays."""
        self.events.append("capture")
        recording = _Recording()
        try:
            with recording:
                result = call()
        finally:
            recording.put_back()

        def replay() -> None:
            self.events.append("replay")
            recording.replay()

        return result, replay


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self._own: set[int] = set()  # addresses of memory that was made here, which `_calls` keep alive
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _waits(func, args):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        for tensor in _written(func, args, kwargs):
            if (place := _place(tensor)) not in self._own | self._before.keys():
                whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                self._before[place] = whole, whole.clone()
        taken = {_place(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **kwargs)
        found = [_alias(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self._own |= {_place(tensor) for tensor in found} - taken
        self._calls.append((func, *tree_map(_alias, (args, kwargs)), found))
        return result

    @torch.no_grad()
    def put_back(self) -> None:
        for whole, before in self._before.values():
            whole.copy_(before)

    @torch.no_grad()
    def replay(self) -> None:
        """No version of a tensor changes, as PyTorch sees no write of a replay."""
        touched = {id(leaf): leaf for call in self._calls for leaf in tree_leaves(call) if isinstance(leaf, Tensor)}
        keep_versions: Any = torch.autograd._unsafe_preserve_version_counter  # pyright: ignore[reportPrivateImportUsage]
        with keep_versions(tuple(touched.values())):
            for func, args, kwargs, found in self._calls:
                again = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, Tensor)]
                for tensor, new in zip(found, again, strict=True):
                    if _place(new) != _place(tensor):
                        assert (new.shape, new.dtype) == (tensor.shape, tensor.dtype), f"{func}: another shape"
                        tensor.copy_(new)


def _waits(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an op waits for the device. Rows that a mask chooses are so many as it says."""
    name, overload = func._schema.name, func._schema.overload_name
    chosen = tree_leaves(args[1]) if name == "aten::index" else []
    return bool({name, f"{name}.{overload}"} & WAITS) or any(
        isinstance(leaf, Tensor) and leaf.dtype == torch.bool for leaf in chosen
    )


def _alias(leaf: Any) -> Any:
    """Its memory as it lies now, whatever becomes of a tensor (`param.data = other`)."""
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """Tensors that an op writes to, by its schema."""
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[number] if number < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor))
