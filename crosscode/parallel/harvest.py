"""A harvest that ranks do together: each runs the language models over its share of the sequences.

H harvest batch (sequences) · S sequence · M models · P hookpoints · D model dimension.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch

from crosscode.data.harvest.harvester import ActivationHarvester
from crosscode.data.text.aligned import OtherTokens
from crosscode.errors import InputError
from crosscode.parallel.group import Group


class TokenShards(ActivationHarvester):
    """The harvester `alone` of each rank, over sequences `bounds(H)` of the same H: all ranks are handed the activations of all,
    in the order of one process, and must call together."""

    def __init__(self, group: Group, alone: ActivationHarvester) -> None:
        self.__dict__.update(alone.__dict__)
        self.group, self.alone = group, alone

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
        own = slice(*self.group.bounds(len(tokens_HS)))
        own_HS = None if segments_HS is None else segments_HS[own]
        acts_HSMPD = self.alone.harvest(tokens_HS[own], own_HS, [other[own] for other in others])
        return self.group.rows_of_all(acts_HSMPD, len(tokens_HS))

    def _check_alike(self, tokens_HS: torch.Tensor) -> None:
        read = torch.tensor([zlib.crc32(tokens_HS.cpu().numpy().tobytes())])
        if any(not torch.equal(of, read) for of in self.group.all_gather(read)):
            raise InputError("data.source: processes read different texts; all must see the same files")


def over_ranks(group: Group | None, harvester: ActivationHarvester) -> ActivationHarvester:
    """In one process, the very same."""
    return harvester if group is None else TokenShards(group, harvester)


def alone(harvester: ActivationHarvester) -> ActivationHarvester:
    """Of one rank, for what only one of them reads."""
    return harvester.alone if isinstance(harvester, TokenShards) else harvester
