"""Which ranks hold which language model, and which sequences of a harvest each of them runs.

M models · H sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from crosscode.config.data import HarvestConfig
from crosscode.data.harvest.language_models import DTYPES, LanguageModel, ranks_answer
from crosscode.parallel.group import Group, joined


@dataclass(frozen=True)
class Teams:
    """Each `size` consecutive ranks are a team, which holds one copy of a language model, or of all. With several models
    `apart`, teams take them in turn: team t holds model t modulo M."""

    group: Group
    n_models: int
    size: int = 1
    apart: bool = False

    @classmethod
    def of(cls, config: HarvestConfig) -> Teams | None:
        """None in one process, which holds all whole."""
        group, parallel = joined(config.parallel), config.parallel
        return None if group is None else cls(group, len(config.language_models), parallel.model, parallel.apart)

    @property
    def n_teams(self) -> int:
        return self.group.size // self.size

    def team(self, rank: int | None = None) -> int:
        return (self.group.rank if rank is None else rank) // self.size

    @property
    def parts_M(self) -> list[list[int]]:
        """Models that the same ranks hold."""
        return [[m] for m in range(self.n_models)] if self.apart else [[*range(self.n_models)]]

    def part(self, rank: int | None = None) -> int:
        return self.team(rank) % len(self.parts_M)

    def holders(self, part: int) -> list[int]:
        """Ranks that hold a part, in the order of the sequences that they give."""
        return [rank for rank in range(self.group.size) if self.part(rank) == part]

    def share(self, n_sequences: int, rank: int | None = None) -> slice:
        """Those whose activations a rank hands to the others: members of a team run the same, and each hands out its own."""
        rank = self.group.rank if rank is None else rank
        holders = self.holders(self.part(rank))
        place = holders.index(rank)
        return slice(place * n_sequences // len(holders), (place + 1) * n_sequences // len(holders))

    def run(self, n_sequences: int) -> slice:
        """Those that this rank's team runs."""
        first = self.team() * self.size
        return slice(self.share(n_sequences, first).start, self.share(n_sequences, first + self.size - 1).stop)

    def holds(self, m: int) -> bool:
        """Whether this rank holds a model, or a part of it."""
        return m in self.parts_M[self.part()]

    def told(self, models: list[LanguageModel]) -> list[LanguageModel]:
        """The models of this rank, and of those that others hold what these say of them."""
        if self.size == 1 and not self.apart:
            return models
        here = {m: (_fingerprint(model), str(model.dtype)) for m, model in enumerate(models) if model.is_here}
        facts = {m: of_model for of_rank in self.group.objects_of_all(here) for m, of_model in of_rank.items()}
        return [*self._with_facts(models, facts)]

    def _with_facts(self, models: list[LanguageModel], facts: dict[int, tuple[str, str]]) -> Iterator[LanguageModel]:
        for m, model in enumerate(models):
            fingerprint, dtype = facts[m]
            if not model.is_here:
                model.model.to(DTYPES[dtype.removeprefix("torch.")])
            yield replace(model, known_fingerprint=fingerprint)


def _fingerprint(model: LanguageModel) -> str:
    """While all ranks that hold it together are here."""
    with ranks_answer(model.n_ranks):
        return model.fingerprint()
