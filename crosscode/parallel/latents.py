"""Latents of which each rank has the columns of its own rows: nothing of size B x L is sent, or held by one rank.

Axes: B tokens · L latents · R rows of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from crosscode_kernels.sparse import DenseLatents, Latents
from torch import Tensor

from crosscode.models.layered_latents import concat_tokens
from crosscode.parallel.group import Group, gathered


class Piece(NamedTuple):
    """The columns `bounds(n_latents)` of one dictionary."""

    own: Latents
    n_latents: int
    t_R: Tensor | None = None
    """the thresholds that they were encoded with, if they were"""


class SpreadLatents(DenseLatents):
    """The latents of one dictionary, or of several beside each other. `value` and `preacts` are those of the own columns; whoever
    asks for `value_BL` is given the columns of all, and makes all ranks send them."""

    def __init__(self, group: Group, pieces: Sequence[Piece]) -> None:
        object.__setattr__(self, "group", group)
        object.__setattr__(self, "pieces", tuple(pieces))

    group: Group
    pieces: tuple[Piece, ...]
    __repr__ = object.__repr__  # that of a dataclass would make ranks send

    def own_of_each(self, *vectors_L: Tensor) -> list[tuple[Piece, list[Tensor]]]:
        """Each piece, and of every vector what belongs to its own columns."""
        found, start = [], 0
        for piece in self.pieces:
            first, last = self.group.bounds(piece.n_latents)
            found.append((piece, [vector_L[start + first : start + last] for vector_L in vectors_L]))
            start += piece.n_latents
        return found

    # ---- those of all ranks

    @property
    def value_BL(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        whole = [gathered(self.group, piece.own.to_dense().T, piece.n_latents).T for piece in self.pieces]
        return torch.cat(whole, 1).contiguous()

    def to_dense(self) -> Tensor:
        return self.value_BL

    @property
    def n_latents(self) -> int:
        return sum(piece.n_latents for piece in self.pieces)

    @property
    def batch_size(self) -> int:
        return self.pieces[0].own.batch_size

    def l0_B(self) -> Tensor:
        return self.group.all_reduce_(torch.stack([piece.own.l0_B() for piece in self.pieces]).sum(0))

    def firing_counts_L(self) -> Tensor:
        return self._of_all(lambda own: own.firing_counts_L().int()).long()

    def max_L(self) -> Tensor:
        return self._of_all(lambda own: own.max_L())

    def _of_all(self, of_own: Callable[[Latents], Tensor]) -> Tensor:
        return torch.cat([self.group.rows_of_all(of_own(piece.own), piece.n_latents) for piece in self.pieces])

    def smallest_positive(self, value: Tensor) -> Tensor:
        return self.group.all_reduce_(super().smallest_positive(value), dist.ReduceOp.MIN)

    # ---- those of this rank

    @property
    def _only(self) -> Piece:
        (piece,) = self.pieces
        return piece

    @property
    def value(self) -> Tensor:
        own = [piece.own.value for piece in self.pieces]
        return own[0] if len(own) == 1 else torch.cat([value.flatten() for value in own])

    @property
    def preacts(self) -> Tensor | None:
        return self._only.own.preacts

    def of_entries(self, value_L: Tensor) -> Tensor:
        own = [(piece.own, piece.own.of_entries(value_R)) for piece, (value_R,) in self.own_of_each(value_L)]
        return own[0][1] if len(own) == 1 else torch.cat([value.expand_as(of.value).flatten() for of, value in own])

    def places(self, stride: int) -> Tensor:
        return self._only.own.places(stride) + self.group.bounds(self.n_latents)[0]

    # ---- others made of these

    def with_value(self, value: Tensor) -> SpreadLatents:
        return SpreadLatents(self.group, [self._only._replace(own=self._only.own.with_value(value))])

    def slice_latents(self, start: int, stop: int) -> DenseLatents:
        """Where that is a dictionary of several, without sending anything."""
        first = 0
        for piece in self.pieces:
            if (first, first + piece.n_latents) == (start, stop):
                return SpreadLatents(self.group, [piece])
            first += piece.n_latents
        return super().slice_latents(start, stop)

    def beside(self, layers: Sequence[Any]) -> SpreadLatents:
        return SpreadLatents(self.group, [piece for layer in layers for piece in layer.pieces])

    def above(self, parts: Sequence[Any]) -> SpreadLatents:
        alike = zip(*(part.pieces for part in parts), strict=True)
        pieces = [Piece(concat_tokens([piece.own for piece in of_parts]), of_parts[0].n_latents) for of_parts in alike]
        return SpreadLatents(self.group, pieces)
