"""Activations that nothing can be learned from: not finite, or so long that they outweigh all others.

R rows that arrive together · H sequences of a harvest · S sequence · M models · P hookpoints · D model dimension.
"""

from __future__ import annotations

from typing import Any

import torch

from crosscode.data.rows import Rows, RowSource, RowStream
from crosscode.errors import NotFinite

N_FOR_MEDIAN = 1024


def norms_of(acts_RMPD: torch.Tensor) -> torch.Tensor:
    """`norm_RMP` in float32, or wider."""
    return torch.linalg.vector_norm(acts_RMPD, dim=-1, dtype=torch.promote_types(acts_RMPD.dtype, torch.float32))


class NormLimit:
    """`max_ratio` times the median norm of each (model, hookpoint), over the first rows that are measured."""

    def __init__(self, max_ratio: float) -> None:
        self.max_ratio = max_ratio
        self.limit_MP: torch.Tensor | None = None

    def keeps(self, acts_RMPD: torch.Tensor) -> torch.Tensor:
        """`keep_R`: rows that are within the limit everywhere. What is not finite never is."""
        norm_RMP = norms_of(acts_RMPD)
        if self.limit_MP is None:
            self.limit_MP = self.max_ratio * norm_RMP.nanquantile(0.5, dim=0)
        return (norm_RMP <= self.limit_MP.to(norm_RMP.device)).flatten(1).all(1)

    def narrowed(self, mask_HS: torch.Tensor, acts_HSMPD: torch.Tensor) -> torch.Tensor:
        """The usable positions that are within the limit."""
        if not bool(mask_HS.any()):
            return mask_HS
        narrow_HS = mask_HS.clone()
        narrow_HS[mask_HS] = self.keeps(acts_HSMPD[mask_HS.to(acts_HSMPD.device)]).to(mask_HS.device)
        return narrow_HS


class CheckedRows:
    """Another row source whose rows are finite, and within a limit of their norms where one is set.

    Args:
        max_norm_ratio: rows with a longer activation than this times the median are left out; the median is that of
            the first 1024 rows or more, for each (model, hookpoint). None: what is not finite is an error.
    """

    def __init__(self, rows: RowSource, max_norm_ratio: float | None = None) -> None:
        self.rows, self.max_norm_ratio = rows, max_norm_ratio
        self.shuffled, self.dims, self.dtype, self.device = rows.shuffled, rows.dims, rows.dtype, rows.device
        self._limit: NormLimit | None = None

    def open(self, state: dict[str, Any] | None = None) -> RowStream:
        return _CheckedStream(self.rows.open(state), self.limit())

    def open_sample(self) -> RowStream:
        return _CheckedStream(self.rows.open_sample(), self.limit())

    def settings(self) -> dict[str, Any]:
        limit = {} if self.max_norm_ratio is None else {"max_norm_ratio": str(self.max_norm_ratio)}
        return {**self.rows.settings(), **limit}

    def scaling_MP(self) -> torch.Tensor | None:
        """None where rows are left out: what the source knows includes them."""
        return self.rows.scaling_MP() if self.max_norm_ratio is None else None

    def limit(self) -> NormLimit | None:
        """Measured once."""
        if self.max_norm_ratio is not None and self._limit is None:
            parts, sample = list[torch.Tensor](), self.rows.open_sample()
            while sum(map(len, parts)) < N_FOR_MEDIAN and (rows := next(sample, None)) is not None:
                parts.append(rows.acts_RMPD)
            sample.close()
            if parts:
                self._limit = NormLimit(self.max_norm_ratio)
                self._limit.keeps(torch.cat(parts))
        return self._limit


class _CheckedStream:
    def __init__(self, stream: RowStream, limit: NormLimit | None) -> None:
        self._stream, self._limit = stream, limit
        self.state_dict, self.close = stream.state_dict, stream.close

    def __iter__(self) -> _CheckedStream:
        return self

    def __next__(self) -> Rows:
        rows = next(self._stream)
        if self._limit is None:
            check_finite(rows.acts_RMPD)
            return rows
        keep_R = self._limit.keeps(rows.acts_RMPD)
        return rows if bool(keep_R.all()) else Rows(rows.acts_RMPD[keep_R], rows.epoch)


def check_finite(acts_RMPD: torch.Tensor) -> None:
    """Raise `NotFinite` where an activation is NaN or infinite."""
    # One cheap pass: a sum of finite values is finite, but for an overflow, after which each value is looked at.
    if bool(acts_RMPD.sum(dtype=torch.float32).isfinite()):
        return
    bad_RMP = ~acts_RMPD.isfinite().all(-1)
    if bool(bad_RMP.any()):
        where_MP = bad_RMP.sum(0)
        m, p = divmod(int(where_MP.argmax()), where_MP.shape[1])
        raise NotFinite(advice(int(where_MP[m, p]), len(bad_RMP), f"model {m}, hookpoint {p}", acts_RMPD.dtype))


def advice(n_bad: int, n: int, place: str, dtype: torch.dtype | None = None) -> str:
    """What is not finite, and what helps."""
    stored = "" if dtype is None else f" (in {str(dtype).removeprefix('torch.')})"
    return (
        f"activations of {n_bad} of {n} tokens are not finite at {place}{stored}: float16 ends at 65,504, so if "
        "data.activation_dtype or a model's dtype is float16, take bfloat16 or float32; data.max_norm_ratio: 100 leaves "
        "such tokens out"
    )
