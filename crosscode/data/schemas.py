"""What files of activations may say: schemas, as those of `crosscode.stored`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from crosscode.stored import Count, Size, Stored


class StoredModel(Stored):
    name: str
    dtype: str


class StoreManifest(Stored):
    """`manifest.json`"""

    format: Literal["crosscode-activations"]
    version: int
    models: Annotated[list[StoredModel], Field(min_length=1)]
    tokenizer: str
    hookpoints: Annotated[list[str], Field(min_length=1)]
    dims: Annotated[list[Size], Field(min_length=3, max_length=3)]
    dtype: Literal["float32", "bfloat16", "int8"]
    tokens: dict[str, Any]


class RolloutsManifest(Stored):
    """`manifest.json` of a folder of rollouts."""

    version: int
    n_batches: Count | None


class ShardInfo(Stored):
    """What a shard's header says beside the shapes of its tensors."""

    index: Count
    norm_sums: list[list[Annotated[float, Field(ge=0, allow_inf_nan=False)]]]
    content: str | None = None
    token_hash: str | None = None
    labels: Annotated[str, Field(pattern="^[0-9a-f]{8}$")] | None = None


class TensorHeader(Stored):
    shape: Annotated[list[Size], Field(min_length=1)]


class ShardMetadata(Stored):
    info: str


class ShardHeader(Stored):
    """The part of a shard's safetensors header that is read; the whole is compared with what it must be."""

    metadata: ShardMetadata = Field(alias="__metadata__")
    sums: TensorHeader


class HeldoutEntry(TensorHeader):
    dtype: str
    data_offsets: Annotated[list[Count], Field(min_length=2, max_length=2)]


class HeldoutMetadata(Stored):
    first_row: Annotated[str, Field(pattern=r"^\d+$")]
    n_heldout: Annotated[str, Field(pattern=r"^\d+$")]


class HeldoutHeader(Stored):
    """The header of `heldout.safetensors`."""

    __pydantic_extra__: dict[str, HeldoutEntry]  # pyright: ignore[reportIncompatibleVariableOverride]
    metadata: HeldoutMetadata = Field(alias="__metadata__")
    acts: HeldoutEntry


class PositionMetadata(Stored):
    state: str
    finished: Literal["0", "1"]


class PositionHeader(Stored):
    """The part of a saved position's safetensors header that is read."""

    metadata: PositionMetadata = Field(alias="__metadata__")
