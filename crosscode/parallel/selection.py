"""The largest of candidates that are spread over ranks: exact, no shape depends on the data, and nothing is read by the host.

Keys are `(value, inverted place)`: no two are equal, so the lowest place wins among equal values.

Of a whole batch: digit by digit, ranks add up integer histograms of how many keys have it; that of the last key kept is where the
sum from above reaches what is still wanted. Of each token: its k largest are among the k largest of each rank, which are sent to
the one rank that compares those of this token, and what that one keeps to all. Histograms for each token would be `B` times as
many: docs/scale.md counts both.

Axes: B tokens · k kept per token · K offered per token by a rank · C candidates · N kept of all ranks · W values of a digit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from crosscode.parallel.group import Group, summed

DIGIT_BITS = 16
LAST = 0xFFFFFFFF
"""What indices are subtracted from, so that the lowest is the largest."""


def kept_of_all(group: Group, rank_C: Tensor, place_C: Tensor, n_kept: int, n_places: int) -> Tensor:
    """Which candidates are among the `n_kept` largest of all ranks (bool). No negative values; each place below `n_places` and of
    one rank; NaN is the largest."""
    bits = _value_bits(rank_C.dtype)
    value_C = (rank_C if bits == 63 else rank_C.float()).abs().view(torch.int64 if bits == 63 else torch.int32).long()
    kept_C, equal_C = torch.zeros_like(value_C, dtype=torch.bool), torch.ones_like(value_C, dtype=torch.bool)
    wanted = torch.full((), n_kept, device=rank_C.device)
    for key_C, n_bits in ((value_C, bits), (n_places - 1 - place_C, max(n_places - 1, 1).bit_length())):
        for shift in _shifts(n_bits):
            digit_C = (key_C >> shift) & ((1 << DIGIT_BITS) - 1)
            count_W = torch.zeros(1 << DIGIT_BITS, dtype=torch.int32, device=rank_C.device)
            count_W = group.all_reduce_(count_W.index_add_(0, digit_C, equal_C.int())).long()
            from_above_W = count_W.flip(0).cumsum(0).flip(0)
            cut = (from_above_W >= wanted).sum() - 1
            wanted = wanted - (from_above_W - count_W).gather(0, cut[None])[0]
            kept_C = kept_C | (equal_C & (digit_C > cut))
            equal_C = equal_C & (digit_C == cut)
    return kept_C | equal_C


def collected(group: Group, kept_C: Tensor, value_C: Tensor, place_C: Tensor, n_kept: int) -> tuple[Tensor, Tensor]:
    """`value_N, place_N` of what all ranks keep, `n_kept` of them, by place; a gradient passes through the values."""
    n_C = torch.stack(group.all_gather(kept_C.sum()[None])).flatten()
    first = n_C[: group.rank].sum()
    slot_C = torch.where(kept_C, first + kept_C.cumsum(0) - 1, n_kept)  # one behind the last is for what is not kept
    place_N = group.all_reduce_(place_C.new_zeros(n_kept + 1).scatter_(0, slot_C, place_C)[:n_kept].contiguous())
    value_N = summed(group, value_C.new_zeros(n_kept + 1).scatter(0, slot_C, value_C)[:n_kept])
    order_N = place_N.argsort()
    return value_N[order_N], place_N[order_N]


def largest_of_all(group: Group, value_BK: Tensor, index_BK: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`value_Bk, index_Bk`: the k largest of each token among what ranks offer, K each, descending; the lowest index wins among
    equal values, of which none is negative; NaN is the largest. A rank compares what all offer of its share of the tokens."""
    n_tokens, K = value_BK.shape
    share, wide = -(-n_tokens // group.size) or 1, value_BK.dtype == torch.float64
    bits_BK = (value_BK if wide else value_BK.float()).abs().view(torch.int64 if wide else torch.int32).long()
    after_BK = LAST - index_BK
    offered = []
    for key_BK in (bits_BK, after_BK) if wide else ((bits_BK << 32) | after_BK,):
        padded_BK = torch.nn.functional.pad(key_BK, (0, 0, 0, share * group.size - n_tokens))
        offered.append(group.exchange(padded_BK).view(group.size, share, K).transpose(0, 1).flatten(1))
    best_Bk = first_of(offered, k)
    bits_Bk, *after = (torch.cat(group.all_gather(key_BC.gather(1, best_Bk)))[:n_tokens] for key_BC in offered)
    if wide:
        return bits_Bk.view(torch.float64), LAST - after[0]
    return (bits_Bk >> 32).int().view(torch.float32).to(value_BK.dtype), LAST - (bits_Bk & LAST)


def first_of(keys: Sequence[Tensor], k: int) -> Tensor:
    """Where the k largest of each row of `keys` (B, C) stand, descending: by the first key, where that is equal by the next."""
    if len(keys) == 1:
        return keys[0].topk(k, dim=1).indices
    order_BC = keys[1].argsort(dim=1, descending=True)
    return order_BC.gather(1, keys[0].gather(1, order_BC).sort(dim=1, descending=True, stable=True).indices[:, :k])


def _value_bits(dtype: torch.dtype) -> int:
    return 63 if dtype == torch.float64 else 31


def _shifts(n_bits: int) -> list[int]:
    return list(range(0, n_bits, DIGIT_BITS))[::-1]
