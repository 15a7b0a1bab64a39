"""What a user can set of stores of activations. No torch here."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import PositiveFloat, PositiveInt

from crosscode.config.registry import ConfigModel, NamedByPath, Printable


class CacheConfig(ConfigModel):
    """A store of activations on disk that a run writes while it trains, or `crosscode harvest` writes ahead."""

    path: Printable
    """folder or fsspec URL (s3://bucket/store); a store that is there already is read and continued, if it holds the same"""
    dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    """dtype on disk; int8 has one scale for each vector. Training sees the stored values, from the first epoch on"""
    shard_mb: PositiveInt = 256
    """MiB of a shard: a crash loses at most the shard that was not finished"""
    max_gb: PositiveFloat | None = None
    """GiB at which the store stops growing; what does not fit is harvested again each epoch"""

    def arguments(self) -> dict[str, Any]:
        """As `HarvestThroughStore` takes them, beside the path."""
        max_bytes = None if self.max_gb is None else int(self.max_gb * 2**30)
        return {"dtype": self.dtype, "shard_bytes": self.shard_mb << 20, "max_bytes": max_bytes}


class StoreConfig(NamedByPath):
    """A store to read; its path alone will do."""

    path: Printable
    """folder or URL that `crosscode harvest` or a run with `data.cache` has written"""
    weight: PositiveFloat | None = None
    """how often an activation comes from it, relative to the other stores; null in all: in proportion to their sizes"""
