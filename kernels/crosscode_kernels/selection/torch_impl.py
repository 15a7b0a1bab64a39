"""Selection in stock ops: exact ties without a full sort.

Axes: B tokens · L latents · R rows · C columns · K kept per row.

`Tensor.topk` does not say which of several equal values it returns. Two ways make the lowest index win: integer keys
that hold value and inverted index, so that no two are equal; or, on the CPU, one more value than asked for, which shows
the rows whose cut runs through equal values, so that only these are decided by keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

_INDEX_MASK = 0xFFFFFFFF
_INT16_COLUMNS = 1 << 16
_GROUPS = (8, 4)
_MIN_GROUPS_PER_KEPT = 2


def row_topk(h_RC: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of `relu(h)` of each row, largest first, and their columns (int32). 0 < k <= C, R > 0.

    Equal positive values: the lowest columns. Which zeros fill a row of fewer than k positive values is not specified."""
    if h_RC.dtype == torch.float64:
        value_RC, column_RC = h_RC.relu().sort(dim=1, descending=True, stable=True)
        return value_RC[:, :k].contiguous(), column_RC[:, :k].int().contiguous()
    if h_RC.dtype in (torch.float16, torch.bfloat16) or h_RC.device.type != "cpu":
        return _row_topk_by_keys(h_RC, k)
    top_RK, top_column_RK = topk_in_groups(h_RC, min(k + 1, h_RC.shape[1]))
    value_RK, column_RK = top_RK[:, :k].relu(), top_column_RK[:, :k].int()
    if k < h_RC.shape[1]:
        last_R, next_R = top_RK[:, k - 1], top_RK[:, k]
        tied_R = ~((last_R > next_R) | (last_R <= 0))
        if bool(tied_R.any()):
            value_RK[tied_R], column_RK[tied_R] = _row_topk_by_keys(h_RC[tied_R], k)
    return value_RK, column_RK


def topk_in_groups(h_RC: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`topk`, with its costly part on few values: the k largest lie in the k groups of columns whose maxima are largest;
    and so among these maxima, level upon level.

    A group is every `C / 8`-th column (or 4-th part), so that maxima are taken over whole vectors."""
    levels, groups = [h_RC], []
    while group := _group_of(levels[-1].shape[1], k):
        groups.append(group)
        levels.append(levels[-1].view(h_RC.shape[0], group, -1).amax(1))
    value_RK, column_RK = levels.pop().topk(k, dim=1, sorted=not levels)
    while levels:
        level_RC, group = levels.pop(), groups.pop()
        n_groups = level_RC.shape[1] // group
        members_G1 = torch.arange(0, level_RC.shape[1], n_groups, device=h_RC.device).unsqueeze(1)
        column_RC = (column_RK.unsqueeze(1) + members_G1).view(h_RC.shape[0], -1)
        value_RK, position_RK = level_RC.gather(1, column_RC).topk(k, dim=1, sorted=not levels)
        column_RK = column_RC.gather(1, position_RK)
    return value_RK, column_RK


def _group_of(n_columns: int, k: int) -> int:
    """Columns of a group; 0 where groups are too few to save work."""
    fits = (group for group in _GROUPS if n_columns % group == 0 and n_columns // group >= _MIN_GROUPS_PER_KEPT * k)
    return next(fits, 0)


def _row_topk_by_keys(h_RC: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As `row_topk`, for any dtype but float64, without a look at the data: no wait for a device."""
    n_columns = h_RC.shape[1]
    # `abs` only matters for -0.0 and for NaN with a sign: the bits of what remains are ordered like the values.
    a_RC = h_RC.relu().abs()
    columns_C = torch.arange(n_columns, device=h_RC.device)
    if h_RC.dtype == torch.float32:
        keys_RC = (a_RC.view(torch.int32).long() << 32) | (_INDEX_MASK - columns_C)
        key_RK = keys_RC.topk(k, dim=1).values
        value_RK = (key_RK >> 32).int().view(torch.float32)
        return value_RK, (_INDEX_MASK - (key_RK & _INDEX_MASK)).int()
    bits_RC = a_RC.view(torch.int16)
    if n_columns <= _INT16_COLUMNS:
        keys_RC = (bits_RC.int() << 16) | (_INT16_COLUMNS - 1 - columns_C).int()
        key_RK = keys_RC.topk(k, dim=1).values
        value_RK = (key_RK >> 16).to(torch.int16).view(h_RC.dtype)
        return value_RK, _INT16_COLUMNS - 1 - (key_RK & (_INT16_COLUMNS - 1))
    keys_RC = (bits_RC.long() << 32) | (_INDEX_MASK - columns_C)
    key_RK = keys_RC.topk(k, dim=1).values
    return (key_RK >> 32).to(torch.int16).view(h_RC.dtype), (_INDEX_MASK - (key_RK & _INDEX_MASK)).int()


def first_k_of_equal(value_RC: Tensor, column_RC: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of `relu(value)` of each row, largest first, with their columns (int32); of equal values the lowest
    columns. float32 only, k <= C."""
    bits_RC = value_RC.relu().abs().view(torch.int32).long()
    key_RK = ((bits_RC << 32) | (_INDEX_MASK - column_RC)).topk(k, dim=1).values
    return (key_RK >> 32).int().view(torch.float32), (_INDEX_MASK - (key_RK & _INDEX_MASK)).int()


def first_of_equal_topk(rank_N: Tensor, n_kept: int) -> Tensor:
    """Positions, ascending, of the `n_kept` largest of `rank_N` (no negative values); equal values: the first ones."""
    if rank_N.dtype == torch.float64:
        return rank_N.sort(descending=True, stable=True).indices[:n_kept].sort().values
    bits_N = rank_N.abs().view(torch.int32 if rank_N.dtype == torch.float32 else torch.int16)
    keys_N = (bits_N.long() << 32) | (_INDEX_MASK - torch.arange(rank_N.shape[0], device=rank_N.device))
    return (_INDEX_MASK - (keys_N.topk(n_kept, sorted=False).values & _INDEX_MASK)).sort().values
