"""Stores of the same token rows, side by side: models or hookpoints that were harvested apart.

R rows, ascending · B rows asked for at once · M models · P hookpoints · E bytes of a row or a vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad

from crosscode.config.nested import flatten
from crosscode.data.store.format import Layout, PackedRows, StoreError, unpack
from crosscode.data.store.manifest import Manifest
from crosscode.data.store.place import Place
from crosscode.data.store.reader import ActivationCache
from crosscode.data.text.labels import Labels

_ROWS_AT_ONCE = 4096


class JoinedStores:
    """Several stores read as one, whose rows are theirs beside each other: along models where they have the same
    hookpoints, along hookpoints where they have the same models, in the order in which they are named.

    Raises StoreError unless all hold the same tokens in the same order (by their manifests, by the number of rows, and by
    the hash of the token ids where the shards have it), in one dtype on disk and before, and no model and hookpoint twice.
    """

    def __init__(self, paths: Sequence[str | Place]) -> None:
        self.stores = [ActivationCache(path) for path in paths]
        for store in self.stores:
            store.check_not_empty()
            _check_same_rows(self.stores[0], store)
        self.path = self.stores[0].path
        manifests = [store.manifest for store in self.stores]
        self.manifest, self._axis = _joined(manifests, [str(store.path) for store in self.stores])
        self.layout = Layout(tuple(self.manifest["dims"]), self.manifest["dtype"])
        self.dims, self.dtype = self.layout.dims, self.layout.read_dtype

    @property
    def n_rows(self) -> int:
        return self.stores[0].n_rows

    @property
    def is_remote(self) -> bool:
        return any(store.is_remote for store in self.stores)

    def __str__(self) -> str:
        return "the join of " + " and ".join(map(str, self.stores))

    def content(self) -> str:
        return "+".join(store.content() for store in self.stores)

    def check_not_empty(self) -> None:
        """None is empty."""

    def labels(self) -> Labels | None:
        """As `ActivationCache.labels`."""
        return self.stores[0].labels()

    def mean_norm_MP(self) -> torch.Tensor:
        """Mean norm of the activations (float64)."""
        return torch.cat([store.mean_norm_MP() for store in self.stores], dim=self._axis)

    def scaling_MP(self) -> torch.Tensor:
        """`sqrt(D) / mean ||x||` (float32)."""
        return (self.dims[2] ** 0.5 / self.mean_norm_MP()).float()

    def read_ascending(self, index_R: np.ndarray, out: PackedRows | None = None) -> PackedRows:
        """As `ActivationCache.read_ascending`."""
        out = PackedRows.empty(len(index_R), self.layout) if out is None else out
        n_at_once = max(1, len(index_R)) if self.is_remote else _ROWS_AT_ONCE
        for first in range(0, len(index_R), n_at_once):
            part = slice(first, first + n_at_once)
            rows = [store.read_ascending(index_R[part]) for store in self.stores]
            vectors = [one.acts_RE.view(len(one.acts_RE), *store.dims[:2], -1) for one, store in self._zip(rows)]
            widest = max(one.shape[-1] for one in vectors)  # in bytes: narrower vectors end in zeros
            padded = [pad(one, (0, widest - one.shape[-1])) for one in vectors]
            out.acts_RE[part] = torch.cat(padded, dim=1 + self._axis).flatten(1)
            if out.scales_RMP is not None:
                scales = [one.scales_RMP for one in rows if one.scales_RMP is not None]
                out.scales_RMP[part] = torch.cat(scales, dim=1 + self._axis)
        return out

    def read_rows(self, index_B: torch.Tensor) -> torch.Tensor:
        """As `ActivationCache.read_rows`."""
        ascending_B, order_B = index_B.sort()
        acts_BMPD = unpack(self.read_ascending(ascending_B.numpy()), self.layout)
        return torch.empty_like(acts_BMPD).index_copy_(0, order_B, acts_BMPD)

    def close(self) -> None:
        for store in self.stores:
            store.close()

    def _zip(self, rows: Sequence[PackedRows]) -> list[tuple[PackedRows, ActivationCache]]:
        return list(zip(rows, self.stores, strict=True))


def _check_same_rows(first: ActivationCache, other: ActivationCache) -> None:
    names = f"stores {str(first.path)!r} and {str(other.path)!r}"
    rounded = ("dtype", "activation_dtype")
    mine, theirs = (
        dict(flatten(store.manifest["tokens"])) | {name: store.manifest.get(name) for name in rounded}
        for store in (first, other)
    )
    for name in dict.fromkeys([*mine, *theirs]):
        if mine.get(name) != theirs.get(name):
            raise StoreError(
                f"{names} cannot be joined: {name} is {mine.get(name)!r} in the first and {theirs.get(name)!r} in the second"
            )
    if first.n_rows != other.n_rows:
        raise StoreError(
            f"{names} cannot be joined: they hold {first.n_rows} and {other.n_rows} rows; harvest both to the same "
            "--n-tokens"
        )
    hashes = first.shards[-1].token_hash, other.shards[-1].token_hash
    if None not in hashes and hashes[0] != hashes[1]:
        raise StoreError(f"{names} cannot be joined: their rows are of other tokens (hash {hashes[0]} and {hashes[1]})")


def _joined(manifests: Sequence[Manifest], names: Sequence[str]) -> tuple[Manifest, int]:
    """The manifest of all, and the axis along which they are joined: 0 models, 1 hookpoints."""
    first = manifests[0]
    models = [[_known(model) for model in manifest["models"]] for manifest in manifests]
    hookpoints = [manifest["hookpoints"] for manifest in manifests]
    if all(names_P == hookpoints[0] for names_P in hookpoints):
        axis, joined = 0, {"models": [model for manifest in manifests for model in manifest["models"]]}
        parts: list[Any] = [model for part in models for model in part]
    elif all(part == models[0] for part in models):
        axis, joined = 1, {"hookpoints": [name for names_P in hookpoints for name in names_P]}
        parts = joined["hookpoints"]
    else:
        raise StoreError(
            f"stores {', '.join(names)} cannot be joined: they have neither the same hookpoints nor the same models"
        )
    if any(parts.count(part) > 1 for part in parts):
        what = ("model", "hookpoint")[axis]
        raise StoreError(f"stores {', '.join(names)} cannot be joined: two of them hold the same {what}")
    dims = [len(models[0]), len(hookpoints[0]), max(manifest["dims"][2] for manifest in manifests)]
    dims[axis] = len(parts)
    return {**first, **joined, "dims": dims}, axis


def _known(model: dict[str, Any]) -> tuple[Any, Any]:
    return model["weights"], model["dtype"]
