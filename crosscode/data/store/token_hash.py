"""A hash of token ids that does not depend on where shards end: of rows that were harvested apart, whether they are of the
same tokens.

R rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

_BASE = np.uint64(0x9E3779B97F4A7C15)
_MODULUS = 1 << 64


@dataclass(frozen=True)
class TokenHash:
    """`sum_i (id_i + 1) * base ** (n - 1 - i)` modulo 2^64, a polynomial of the ids in their order."""

    value: int = 0

    @classmethod
    def after(cls, text: str | None) -> TokenHash | None:
        """To go on from one that was written; None where nothing is known."""
        return None if text is None else cls(int(text, 16))

    def with_tokens(self, tokens_R: torch.Tensor | None) -> TokenHash | None:
        """Of these ids as well; None where they are not known."""
        if tokens_R is None:
            return None
        n = len(tokens_R)
        powers = np.full(n + 1, _BASE)
        powers[0] = 1
        powers = np.cumprod(powers, dtype=np.uint64)  # wraps
        ids_R = tokens_R.cpu().numpy().astype(np.uint64) + np.uint64(1)
        own = int((ids_R * powers[:n][::-1]).sum(dtype=np.uint64))
        return TokenHash((self.value * int(powers[n]) + own) % _MODULUS)

    def __str__(self) -> str:
        return f"{self.value:016x}"
