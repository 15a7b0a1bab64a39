"""Where rows of activations come from: the seam between harvest, store and dataloader.

H harvest batch (sequences) · S sequence · R rows that arrive together · M models · P hookpoints · D model dimension.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from crosscode.data.harvest.harvester import ActivationHarvester
from crosscode.data.harvest.trials import check_isolation, check_length
from crosscode.data.text.labels import Labels
from crosscode.data.text.token_batch import TokenBatch
from crosscode.data.text.tokens import TokenSequenceLoader
from crosscode.errors import InputError


@dataclass(frozen=True)
class Rows:
    """Usable, unscaled activations `acts_RMPD` in the order in which they come (R rows); `epoch` counts from 0.
    `tokens_R`: their token ids, where they come straight from a harvest, as what `labels` say of them.

    The tensor belongs to whoever receives it: a source keeps no hold on its memory.
    """

    acts_RMPD: torch.Tensor
    epoch: int
    tokens_R: torch.Tensor | None = None
    labels: Labels | None = None


class RowStream(Iterator[Rows], Protocol):
    """One pass over a row source."""

    def state_dict(self) -> dict[str, Any]:
        """Position after the last rows that were handed out: tensors, ints, strings and dictionaries of these."""
        ...

    def close(self) -> None:
        """Give back threads and files."""
        ...


class RowSource(Protocol):
    """Rows that can be opened many times, at any saved position. `shuffled`: they come in random order already."""

    shuffled: bool

    @property
    def dims(self) -> tuple[int, int, int]:
        """(M, P, D)."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows that are handed out."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the rows are handed out."""
        ...

    def open(self, state: dict[str, Any] | None = None) -> RowStream:
        """A stream from the beginning, or from the `state` that a stream had."""
        ...

    def open_sample(self) -> RowStream:
        """A pass of its own over the beginning, for estimates; it ends and moves no other stream."""
        ...

    def settings(self) -> dict[str, Any]:
        """Ints and strings that must be equal where a saved position is to be continued."""
        ...

    def scaling_MP(self) -> torch.Tensor | None:
        """Scaling factors that the source knows without reading rows, or None."""
        ...


class HarvestedRows:
    """Rows straight from the language models, in reading order."""

    shuffled = False

    def __init__(self, token_loader: TokenSequenceLoader, harvester: ActivationHarvester) -> None:
        policy = token_loader.policy
        check_length(harvester, policy.sequence_length)
        if policy.isolate_documents and "bridge" in harvester.paths:
            raise InputError(
                f"isolate_documents: {harvester.hookpoints} need TransformerBridge, which has no document isolation; "
                "use hookpoints that are inputs or outputs of modules"
            )
        if policy.isolate_documents:
            check_isolation(harvester)
        self.token_loader = token_loader
        self.harvester = harvester
        self.dims, self.dtype, self.device = harvester.dims, harvester.dtype, harvester.device

    def open(self, state: dict[str, Any] | None = None) -> RowStream:
        return _HarvestStream(self.token_loader.fresh(), self.harvester, state)

    def open_sample(self) -> RowStream:
        return _HarvestStream(self.token_loader.fresh(epochs=1), self.harvester, None)

    def settings(self) -> dict[str, Any]:
        tokens = json.loads(self.token_loader.describe())
        own = {"hookpoints": ",".join(self.harvester.hookpoints)}
        return own | {f"tokens.{name}": json.dumps(value) for name, value in tokens.items()}

    def scaling_MP(self) -> torch.Tensor | None:
        return None


class _HarvestStream:
    def __init__(
        self, token_loader: TokenSequenceLoader, harvester: ActivationHarvester, state: dict[str, Any] | None
    ) -> None:
        if state is not None:
            token_loader.load_state_dict(state)
        self._tokens = token_loader
        self._iterator = iter(token_loader)
        self._harvester = harvester

    def __iter__(self) -> Iterator[Rows]:
        return self

    def __next__(self) -> Rows:
        batch = next(self._iterator)
        labels = None if batch.labels is None else batch.labels[batch.mask_HS]
        return Rows(harvest_usable(self._harvester, batch), batch.epoch, batch.tokens_HS[batch.mask_HS], labels)

    def state_dict(self) -> dict[str, Any]:
        return self._tokens.state_dict()

    def close(self) -> None:
        """Nothing is held open."""


def harvest_usable(harvester: ActivationHarvester, batch: TokenBatch) -> torch.Tensor:
    """Activations `acts_RMPD` of the usable positions of a token batch, in reading order."""
    acts_HSMPD = harvester.harvest(*batch.inputs)
    return acts_HSMPD[batch.mask_HS.to(acts_HSMPD.device)]
