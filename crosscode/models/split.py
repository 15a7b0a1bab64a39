"""Harvested activations -> (input, target), for each architecture. No other file knows how.

Axes: B tokens · M models · P hookpoints · D model dimension · Xi/Xo input/output crosscoding dims.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from crosscode.errors import InputError

Hookpoints = int | slice
"""One hookpoint (its axis disappears), or several (its axis stays)."""


@dataclass(frozen=True)
class Split:
    """How one architecture reads `acts_BMPD`.

    Get one with `split_for`; the callables take the number of hookpoints P.
    """

    kind: str
    """the architecture, as configs name it"""
    model_kind: str
    """`kind` of the model class that trains on this split (a key of `crosscode.models.MODELS`)"""
    in_hookpoints: Callable[[int], Hookpoints]
    out_hookpoints: Callable[[int], Hookpoints]
    keeps_models: bool
    """whether the axis M is part of Xi and Xo; else there is exactly one model"""
    hookpoints_rule: str
    accepts_n_hookpoints: Callable[[int], bool]

    def check(self, n_models: int, n_hookpoints: int) -> None:
        """Raise `InputError` where this architecture cannot read M models at P hookpoints."""
        if n_models < 1 or (n_models != 1 and not self.keeps_models):
            raise InputError(f"{self.kind}: reads one language model, got {n_models}")
        if not self.accepts_n_hookpoints(n_hookpoints):
            raise InputError(f"{self.kind}: {self.hookpoints_rule}, got {n_hookpoints} hookpoint(s)")

    def activations(self, acts_BMPD: Tensor) -> tuple[Tensor, Tensor]:
        """`(input_BXiDi, target_BXoDo)`: views of `acts_BMPD`, which may have any leading axes in place of B."""
        if acts_BMPD.ndim < 3:
            raise InputError(f"activations: expected shape (..., M, P, D), got {tuple(acts_BMPD.shape)}")
        in_, out = self._indices(*acts_BMPD.shape[-3:-1])
        return acts_BMPD[(..., *in_, slice(None))], acts_BMPD[(..., *out, slice(None))]

    def scaling(self, scaling_MP: Tensor) -> tuple[Tensor, Tensor]:
        """`(scaling_in_Xi, scaling_out_Xo)`: what `fold_activation_scaling_into_weights_` takes."""
        if scaling_MP.ndim != 2:
            raise InputError(f"scaling: expected shape (M, P), got {tuple(scaling_MP.shape)}")
        in_, out = self._indices(*scaling_MP.shape)
        return scaling_MP[in_], scaling_MP[out]

    def output_names(self, names_MP: Sequence[Sequence[str]]) -> list[str]:
        """Names of the output's crosscoding positions, flattened in the order of Xo."""
        return self._names(names_MP, 1)

    def input_names(self, names_MP: Sequence[Sequence[str]]) -> list[str]:
        """Names of the input's crosscoding positions, flattened in the order of Xi."""
        return self._names(names_MP, 0)

    def model_dims(self, n_models: int, n_hookpoints: int, d_model: int) -> dict[str, Any]:
        """Constructor arguments of the model class that give its dimensions."""
        self.check(n_models, n_hookpoints)
        match self.model_kind:
            case "model_hookpoint_acausal":
                return {"n_models": n_models, "n_hookpoints": n_hookpoints, "d_model": d_model}
            case "sae_or_transcoder":
                return {"d_in": d_model, "d_out": d_model}
            case "cross_layer_transcoder":
                return {"n_out_hookpoints": n_hookpoints - 1, "d_in": d_model, "d_out": d_model}
            case _:
                return {"n_layers": n_hookpoints // 2, "d_in": d_model, "d_out": d_model}

    def _indices(self, n_models: int, n_hookpoints: int) -> tuple[tuple[Hookpoints, Hookpoints], ...]:
        self.check(n_models, n_hookpoints)
        models: Hookpoints = slice(None) if self.keeps_models else 0
        return (models, self.in_hookpoints(n_hookpoints)), (models, self.out_hookpoints(n_hookpoints))

    def _names(self, names_MP: Sequence[Sequence[str]], side: int) -> list[str]:
        models, hookpoints = self._indices(len(names_MP), len(names_MP[0]))[side]
        rows = names_MP[models] if isinstance(models, slice) else [names_MP[models]]
        if not isinstance(hookpoints, slice):
            return [row[hookpoints] for row in rows]
        return [name for row in rows for name in row[hookpoints]]


def _all(n_hookpoints: int) -> Hookpoints:
    return slice(None)


def _first(n_hookpoints: int) -> Hookpoints:
    return 0


SPLITS: dict[str, Split] = {
    split.kind: split
    for split in (
        Split(
            "model_hookpoint_acausal", "model_hookpoint_acausal", _all, _all, True,
            "needs at least one hookpoint", lambda p: p >= 1,
        ),
        Split(
            "sae", "sae_or_transcoder", _first, _first, False,
            "reads and reconstructs exactly one hookpoint", lambda p: p == 1,
        ),
        Split(
            "transcoder", "sae_or_transcoder", _first, lambda p: 1, False,
            "needs exactly two hookpoints, [input, output]", lambda p: p == 2,
        ),
        Split(
            "cross_layer_transcoder", "cross_layer_transcoder", _first, lambda p: slice(1, None), False,
            "needs at least two hookpoints, [input, output, output, ...]", lambda p: p >= 2,
        ),
        Split(
            "compound_cross_layer_transcoder", "compound_cross_layer_transcoder",
            lambda p: slice(0, p // 2), lambda p: slice(p // 2, None), False,
            "needs as many output as input hookpoints, [input of each layer ..., output of each layer ...]",
            lambda p: p >= 2 and p % 2 == 0,
        ),
    )
}  # fmt: skip
"""Every architecture by the name that configs use."""


def split_for(kind: str) -> Split:
    """The split of an architecture: a key of `SPLITS`."""
    if kind not in SPLITS:
        near = difflib.get_close_matches(kind, SPLITS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise InputError(f"model.type: unknown architecture {kind!r}{hint}; available: {', '.join(SPLITS)}")
    return SPLITS[kind]
