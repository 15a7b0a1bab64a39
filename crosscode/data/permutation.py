"""A random order of 0..n-1 that needs no table.

B indices asked for at once.
"""

from __future__ import annotations

import numpy as np
import torch

from crosscode.seeds import number_of

_ROUNDS = 6
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def permuted(positions_B: torch.Tensor, n: int, seed: int) -> torch.Tensor:
    """Where each of `positions_B` (int64, in [0, n)) lands under the permutation of [0, n) that `seed` names.

    A Feistel network on the bits that cover `n`, applied again to whatever falls outside [0, n) (cycle walking; less
    than twice on average). Memory does not grow with `n`, which may be up to 2^62.
    """
    n_bits = max(2, (n - 1).bit_length())
    keys = [np.uint64(number_of(f"{seed}:{i}")) for i in range(_ROUNDS)]
    out_B = _network(positions_B.numpy().astype(np.uint64), n_bits, keys)
    outside = np.flatnonzero(out_B >= n)
    while outside.size:
        out_B[outside] = _network(out_B[outside], n_bits, keys)
        outside = outside[out_B[outside] >= n]
    return torch.from_numpy(out_B.astype(np.int64))


def _network(x_B: np.ndarray, n_bits: int, keys: list[np.uint64]) -> np.ndarray:
    """Each round swaps the halves and mixes one into the other; the halves' widths alternate where `n_bits` is odd."""
    right_bits, left_bits = n_bits // 2, n_bits - n_bits // 2
    left_B, right_B = x_B >> np.uint64(right_bits), x_B & np.uint64((1 << right_bits) - 1)
    for key in keys:
        mixed_B = (right_B ^ key) * _MULTIPLIER
        mixed_B ^= mixed_B >> np.uint64(29)
        mixed_B *= _MULTIPLIER
        mixed_B >>= np.uint64(64 - left_bits)
        left_B, right_B = right_B, left_B ^ mixed_B
        left_bits, right_bits = right_bits, left_bits
    return (left_B << np.uint64(right_bits)) | right_B
