"""A harvest that ranks do together: each runs the language models that it holds over its share of the sequences.

H harvest batch (sequences) · S sequence · M models · P hookpoints · D model dimension.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch

from crosscode.data.harvest.harvester import ActivationHarvester
from crosscode.data.harvest.probe import random_tokens
from crosscode.data.text.aligned import OtherTokens
from crosscode.errors import InputError
from crosscode.parallel.teams import Teams
from crosscode.widths import Widths


class TokenShards(ActivationHarvester):
    """The harvester `alone` of each rank, over the sequences of its team: all ranks are handed the activations of all models
    and sequences, in the order of one process, and must call together."""

    def __init__(self, teams: Teams, alone: ActivationHarvester) -> None:
        if teams.apart:
            here = {m: alone.widths_MP[m] for m in teams.parts_M[teams.part()]}
            widths = {m: widths_P for of in teams.group.objects_of_all(here) for m, widths_P in of.items()}
            alone.widths_MP = Widths(widths[m] for m in range(teams.n_models))
        self.__dict__.update(alone.__dict__)
        self.teams, self.alone = teams, alone
        if teams.size > 1:
            self._check_whole()

    def harvest(
        self,
        tokens_HS: torch.Tensor,
        segments_HS: torch.Tensor | None = None,
        others: Sequence[OtherTokens] = (),
    ) -> torch.Tensor:
        """See `ActivationHarvester.harvest`.

        Raises:
            InputError: besides, ranks have read different texts.
        """
        self._check_tokens(tokens_HS)  # whole, so that all say what is wrong
        self._check_alike(tokens_HS)
        H, run, share = len(tokens_HS), self.teams.run(len(tokens_HS)), self.teams.share(len(tokens_HS))
        run_HS = None if segments_HS is None else segments_HS[run]
        acts_HSMPD = self.alone.harvest(tokens_HS[run], run_HS, [other[run] for other in others])
        own_HSMPD = acts_HSMPD[
            share.start - run.start : share.stop - run.start, :, self.teams.parts_M[self.teams.part()]
        ]
        return self._of_all(own_HSMPD, H)

    def _of_all(self, own_HSMPD: torch.Tensor, H: int) -> torch.Tensor:
        teams = self.teams
        most = -(-H // len(teams.holders(0)))
        padded_HSMPD = own_HSMPD.new_zeros(most, *own_HSMPD.shape[1:])
        padded_HSMPD[: len(own_HSMPD)] = own_HSMPD
        of_ranks = teams.group.all_gather(padded_HSMPD)
        sizes = [share.stop - share.start for share in (teams.share(H, rank) for rank in range(teams.group.size))]
        parts = [
            torch.cat([of_ranks[rank][: sizes[rank]] for rank in teams.holders(part)])
            for part in range(len(teams.parts_M))
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def _check_alike(self, tokens_HS: torch.Tensor) -> None:
        read = torch.tensor([zlib.crc32(tokens_HS.cpu().numpy().tobytes())])
        if any(not torch.equal(of, read) for of in self.teams.group.all_gather(read)):
            raise InputError("data.source: processes read different texts; all must see the same files")

    def _check_whole(self) -> None:
        """That ranks which hold a model together see the same of it, as its plan says, tried on a few tokens."""
        smallest = min(self.models, key=lambda model: model.vocab_size)
        tokens_HS = random_tokens(smallest, 1, min(8, self.max_sequence_length or 8))
        place_HS = torch.arange(tokens_HS.shape[1])[None]
        same_ids = OtherTokens(tokens_HS, place_HS >= 0, None, place_HS)
        acts_HSMPD = self.alone.harvest(tokens_HS, None, [same_ids] * len(self.other_tokenizers)).float()
        teams = self.teams
        of_ranks = teams.group.all_gather(acts_HSMPD[:, :, teams.parts_M[teams.part()]])
        for rank, rank_HSMPD in enumerate(of_ranks):  # all ranks look at all, so that all say what is wrong
            first_HSMPD = of_ranks[teams.team(rank) * teams.size]
            far_MP, norm_MP = (
                torch.linalg.vector_norm(acts, dim=(0, 1, 4)) for acts in (rank_HSMPD - first_HSMPD, first_HSMPD)
            )
            for i, p in (far_MP > 0.05 * norm_MP).nonzero().tolist():
                name = self.models[teams.parts_M[teams.part(rank)][i]].name
                raise InputError(
                    f"parallel.model = {teams.size}: {self.hookpoints[p]!r} of {name!r} is not whole on a process"
                )


def over_ranks(teams: Teams | None, harvester: ActivationHarvester) -> ActivationHarvester:
    """In one process, the very same."""
    return harvester if teams is None else TokenShards(teams, harvester)


def alone(harvester: ActivationHarvester) -> ActivationHarvester:
    """Of one rank, for what only one of them reads."""
    return harvester.alone if isinstance(harvester, TokenShards) else harvester
