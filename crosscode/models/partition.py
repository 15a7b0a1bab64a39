"""The order of latents in a dictionary, and latents that belong to some models only (dedicated feature crosscoder,
Jiralerspong & Bricken 2026, arXiv:2602.11729).

A dictionary holds its latents in this order, and here alone it is stated:

1. tied latents (`n_shared_latents`): one decoder vector for both models;
2. the blocks of `partition`, as they are given: latents of some models only;
3. all others: of every model, with a decoder vector for each.

Any of the three may be empty, and tied latents and a partition go together. Prefixes of the dictionary that must
reconstruct alone (Matryoshka) go with neither: a prefix would hold latents of one kind only (`check_order`).

Axes: L latents · M models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from crosscode_kernels.row_sparse_adam import coalesced
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor

from crosscode.config.checked import checked
from crosscode.config.registry import ConfigModel
from crosscode.errors import InputError


class BlockConfig(ConfigModel):
    """Latents of some models only."""

    models: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)]
    """the models that these latents read and write, as places in language_models, from 0"""
    share: float | None = Field(default=None, gt=0, le=1)
    """how many of all latents; give this or n_latents"""
    n_latents: PositiveInt | None = None
    """the same as a number of latents"""

    @model_validator(mode="after")
    def _one_size(self) -> BlockConfig:
        if (self.share is None) == (self.n_latents is None):
            raise ValueError(f"share = {self.share} and n_latents = {self.n_latents}: give exactly one")
        return self


def check_order(prefixes: Sequence[int], n_shared_latents: int, partition: Partition | None) -> None:
    """Raise `InputError` where two things want the first latents for themselves."""
    if prefixes and (n_shared_latents or partition is not None):
        other = "tied latents (n_shared_latents)" if n_shared_latents else "a partition"
        raise InputError(
            f"prefixes = {list(prefixes)}: do not go with {other}: a prefix would hold latents of one kind only"
        )


@dataclass(frozen=True)
class Block:
    """Latents `rows` belong to `models` only."""

    models: tuple[int, ...]
    rows: slice


@dataclass(frozen=True)
class Partition:
    """Which latents belong to which models. At other models their encoder and decoder weights are exactly 0."""

    blocks: tuple[Block, ...]
    n_models: int
    n_latents: int

    @classmethod
    def of(
        cls, given: Sequence[BlockConfig | Mapping[str, Any]], n_models: int, n_latents: int, n_shared_latents: int
    ) -> Partition | None:
        """The partition of a dictionary; None: every latent belongs to every model.

        Raises:
            InputError: it does not fit the dictionary.
        """
        blocks, start = [], n_shared_latents
        for number, one in enumerate(given):
            field = f"partition.{number}"
            block = one if isinstance(one, BlockConfig) else checked(BlockConfig, dict(one), field)
            models = tuple(sorted(set(block.models)))
            if models[-1] >= n_models or len(models) == n_models:
                raise InputError(
                    f"{field}.models = {list(block.models)}: must be some, and not all, of the {n_models} model(s), "
                    "counted from 0; latents of all models need no block"
                )
            size = block.n_latents or round((block.share or 0) * n_latents)
            if not size:
                raise InputError(f"{field}.share = {block.share}: not one latent of n_latents = {n_latents}")
            blocks.append(Block(models, slice(start, start + size)))
            start += size
        if start > n_latents:
            tied = f" beside {n_shared_latents} tied ones" if n_shared_latents else ""
            raise InputError(
                f"partition: its blocks hold {start - n_shared_latents} latents{tied}, n_latents is {n_latents}"
            )
        return cls(tuple(blocks), n_models, n_latents) if blocks else None

    def as_config(self) -> list[dict[str, Any]]:
        """What `of` takes."""
        return [
            {"models": list(block.models), "n_latents": block.rows.stop - block.rows.start} for block in self.blocks
        ]

    def of_rows(self, rows_of: Callable[[slice], slice]) -> Partition:
        """The same in other rows."""
        return replace(self, blocks=tuple(replace(block, rows=rows_of(block.rows)) for block in self.blocks))

    def models_LM(self) -> Tensor:
        """Whether a latent belongs to a model (bool, on the CPU)."""
        owners_LM = torch.ones(self.n_latents, self.n_models, dtype=torch.bool)
        for rows, m in self.foreign():
            owners_LM[rows, m] = False
        return owners_LM

    def foreign(self) -> Iterator[tuple[slice, int]]:
        """Latents and a model to which they do not belong."""
        for block in self.blocks:
            for m in range(self.n_models):
                if m not in block.models:
                    yield block.rows, m

    @torch.no_grad()
    def clear_(self, *tensors_LM: Tensor) -> None:
        """Zero what is foreign in weights or gradients, `(L, M, ...)`; gradients may be sparse over latents, and ascend."""
        for tensor_LM in tensors_LM:
            rows_Q = tensor_LM._indices()[0] if tensor_LM.is_sparse else None
            values_QM = tensor_LM if rows_Q is None else tensor_LM._values()
            for rows, m in self.foreign():
                values_QM[rows if rows_Q is None else _found(rows_Q, rows), m].zero_()

    def check_clear(self, weights: Mapping[str, Tensor]) -> None:
        """Raise `InputError` where a foreign weight is not 0."""
        for name, weight_LM in weights.items():
            for rows, m in self.foreign():
                if bool(weight_LM[rows, m].any()):
                    raise InputError(
                        f"{name}: the partition of the model says that latents {rows.start} to {rows.stop - 1} do not "
                        f"belong to model {m}, but their weights there are not 0"
                    )


def with_ascending_rows(grad_L: Tensor) -> Tensor:
    """A gradient, coalesced where it is sparse over latents."""
    return coalesced(grad_L) if grad_L.is_sparse else grad_L


def _found(rows_Q: Tensor, rows: slice) -> slice:
    """Where in ascending `rows_Q` those of a block stand."""
    bounds = torch.tensor([rows.start, rows.stop], device=rows_Q.device)
    first, last = torch.searchsorted(rows_Q.contiguous(), bounds).tolist()
    return slice(first, last)
