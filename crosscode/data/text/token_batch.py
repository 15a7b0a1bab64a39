"""What a token loader hands out.

H harvest batch (sequences) · S sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from crosscode.data.text.aligned import OtherTokens
from crosscode.data.text.labels import Labels


@dataclass(frozen=True)
class TokenBatch:
    """H sequences of S tokens.

    `mask_HS` is True where the activation may be used. `segments_HS`, only with document isolation, numbers the
    documents along each sequence. `epoch` counts from 0; a batch never crosses the end of an epoch. `labels` (H x S) say
    where each position comes from; None where nobody knows.
    """

    tokens_HS: torch.Tensor
    mask_HS: torch.Tensor
    segments_HS: torch.Tensor | None
    epoch: int
    labels: Labels | None = None
    others: tuple[OtherTokens, ...] = ()
    """the same sequences in tokens of the loader's `others`; positions without a partner in each are masked"""
    n_apart: int = 0
    """positions that are masked for that alone"""

    @property
    def inputs(self) -> tuple[Any, ...]:
        """What a harvester takes."""
        return self.tokens_HS, self.segments_HS, *([self.others] if self.others else [])
