"""What an experiment is, wherever its activations come from.

Axes: B tokens · M models · P hookpoints · D width · H sequences of a harvest · S sequence.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crosscode.config.experiment import ExperimentConfig
from crosscode.data.norms import CheckedRows, NormLimit
from crosscode.data.rows import RowSource
from crosscode.data.text.aligned import OtherTokens
from crosscode.evaluation.heldout import EvaluationResult, measure_reconstruction
from crosscode.groups import Groupings
from crosscode.models.base import BaseCrosscoder
from crosscode.models.split import Split
from crosscode.trainers.callbacks import Callback
from crosscode.widths import Widths


@dataclass(frozen=True)
class HeldoutBatch:
    """Held-out sequences, where their activations count, and the raw activations (float32). `group_HSG`: the numbers of each
    position's groups, in the order of the experiment's `groupings`; `others`: as of
    `TokenBatch`; `apart`: how many positions have no partner there, and of how many."""

    tokens_HS: Tensor
    mask_HS: Tensor
    acts_HSMPD: Tensor
    group_HSG: Tensor | None = None
    others: tuple[OtherTokens, ...] = ()
    apart: tuple[int, int] = (0, 0)

    def usable(self) -> Tensor:
        """`acts_BMPD` of the usable positions."""
        return self.acts_HSMPD[self.mask_HS.to(self.acts_HSMPD.device)]

    def grouped(self) -> Tensor | tuple[Tensor, Tensor]:
        """`acts_BMPD` of the usable positions, and their `group_BG` where they are known."""
        return self.usable() if self.group_HSG is None else (self.usable(), self.group_HSG[self.mask_HS])


@dataclass(frozen=True, kw_only=True)
class AnyExperiment(ABC):
    """A checked config, and what must be loaded before anything else can be made."""

    config: ExperimentConfig
    split: Split

    @property
    @abstractmethod
    def dims(self) -> tuple[int, int, int]:
        """(M, P, D)."""

    @property
    def widths_MP(self) -> Widths:
        """How wide the vectors of each position are without padding."""
        *dims, D = self.dims
        return Widths.of((), dims, D)

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where batches are handed out."""

    @property
    @abstractmethod
    def tokenizer(self) -> Any:
        """Of the held-out tokens."""

    @abstractmethod
    def all_rows(self) -> RowSource:
        """Rows to train on, as they are."""

    @property
    def reads_alike(self) -> bool:
        """Whether each of several processes makes all rows to train on, out of a harvest that they do together."""
        return False

    @abstractmethod
    def all_heldout(self) -> Iterator[HeldoutBatch]:
        """Held-out sequences, each once."""

    def keep_heldout_in(self, path: Path) -> None:  # noqa: B027
        """What a run directory at `path` must hold to be looked at, where it is not in the config."""

    def rows(self) -> RowSource:
        """Rows to train on: finite, and within `data.max_norm_ratio`."""
        return CheckedRows(self.all_rows(), self.config.data.max_norm_ratio)

    def norm_limit(self) -> NormLimit | None:
        ratio = self.config.data.max_norm_ratio
        return None if ratio is None else NormLimit(ratio)

    def heldout_batches(self, n_tokens: int | None = None) -> Iterator[HeldoutBatch]:
        """Held-out sequences with `n_tokens` usable activations (default: as configured); fewer if there are fewer."""
        wanted, limit = n_tokens or self.config.evaluation.n_tokens, self.norm_limit()
        for batch in self.all_heldout():
            mask_HS = batch.mask_HS if limit is None else limit.narrowed(batch.mask_HS, batch.acts_HSMPD)
            mask_HS = mask_HS & (mask_HS.flatten().cumsum(0).view_as(mask_HS) <= wanted)
            yield replace(batch, mask_HS=mask_HS)
            wanted -= int(mask_HS.sum())
            if wanted <= 0:
                return

    def language_model_facts(self) -> list[dict[str, Any]]:
        """What a checkpoint says about each language model."""
        return []

    def groupings(self) -> Groupings:
        """Ways to group held-out tokens, with the names of the groups."""
        return {}

    def callbacks(self) -> list[Callback]:
        """What the run directory needs beside what every run has."""
        return []

    def output_names(self) -> list[str]:
        """Names of the output's crosscoding positions, flattened."""
        return self.split.output_names(self.config.position_names())

    def heldout_activations(self, n_tokens: int | None = None) -> Iterator[Tensor]:
        """Raw held-out `acts_BMPD` of usable positions."""
        for batch in self.heldout_batches(n_tokens):
            yield batch.usable()

    def n_evaluated(self, n_tokens: int | None = None) -> int:
        """About how many tokens `evaluate` runs through."""
        return n_tokens or self.config.evaluation.n_tokens

    def evaluate(
        self,
        model: BaseCrosscoder,
        scaling_MP: Tensor | None = None,
        n_tokens: int | None = None,
        through: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    ) -> EvaluationResult:
        """Held-out figures of a model that is folded, or else in training with the scaling in `scaling_MP`. `through` looks
        on as batches go by."""
        apart: list[tuple[int, int]] = []

        def activations() -> Iterator[Tensor | tuple[Tensor, Tensor]]:
            for batch in through(self.heldout_batches(n_tokens)):
                apart.append(batch.apart)
                yield batch.grouped()

        names, groupings = self.output_names(), self.groupings()
        found = measure_reconstruction(model, activations(), self.split, names, scaling_MP, groupings=groupings)
        n_apart, n_positions = map(sum, zip(*apart, strict=True))
        return replace(found, without_partner=n_apart / n_positions) if n_positions else found
