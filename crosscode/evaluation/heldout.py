"""Held-out figures: FVU by crosscoding position, L0, firing density.

Axes: B tokens · M models · P hookpoints · D width · Xo output crosscoding dims · X = flattened Xo · L latents.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from crosscode.data.norms import advice, norms_of
from crosscode.errors import InputError, NotFinite
from crosscode.evaluation.fvu import FvuAccumulator
from crosscode.evaluation.groups import GroupFigures, GroupSums
from crosscode.evaluation.loss_recovered import LossRecovered
from crosscode.evaluation.precision import full_precision
from crosscode.evaluation.prefixes import PrefixFigures, PrefixSums
from crosscode.evaluation.raw_model import RawModel
from crosscode.evaluation.replacement_model import ReplacementModel
from crosscode.groups import ByGroup, Groupings
from crosscode.models.base import BaseCrosscoder
from crosscode.models.split import Split

log = logging.getLogger("crosscode")

FAR_OUT = 50


@dataclass(frozen=True)
class FarOut:
    """Tokens whose activation is more than `FAR_OUT` times the median norm at its position, and the largest ratio."""

    tokens: int
    largest: float


@dataclass(frozen=True)
class EvaluationResult:
    """Figures over `n_tokens` held-out tokens. `fvu` is the fraction of variance unexplained on raw activations (0:
    perfect, 1: as the mean), `fvu_by_position` that of each output position; `density_L` is the share of tokens on
    which a latent fires, `max_activation_L` its largest activation, 0 where it never fires; `dead_fraction` the share
    of latents that never do. `l0` is the mean number of active latents of a token, `l0_p5` and `l0_p95` percentiles
    over tokens.

    `not_finite`: tokens whose activation is NaN or infinite, by position where there are any; `far_out`: those that are
    very long; `constant`: positions without variance, whose FVU is not defined. `l0` and its percentiles are those of
    use: a BatchTopK by its threshold. `l0_train_mode` is there for a BatchTopK: the mean when it selects over batches.
    `loss_recovered` by output position, where it was measured, as `replacement_model`. `groups`: figures apart by `source`
    and `role`, where there are several. `prefixes`: of nested dictionaries, smallest first. `without_partner`: of models of
    different tokenizers the share of positions that are left out, since no token of another one ends there.
    """

    n_tokens: int
    fvu: float
    fvu_by_position: dict[str, float]
    l0: float
    l0_p5: float
    l0_p95: float
    dead_fraction: float
    density_L: list[float]
    l0_train_mode: float | None = None
    max_activation_L: list[float] = field(default_factory=list)
    not_finite: dict[str, int] = field(default_factory=dict)
    far_out: dict[str, FarOut] = field(default_factory=dict)
    constant: list[str] = field(default_factory=list)
    replacement_model: ReplacementModel | None = None
    loss_recovered: dict[str, LossRecovered] = field(default_factory=dict)
    groups: dict[str, dict[str, GroupFigures]] = field(default_factory=dict)
    prefixes: list[PrefixFigures] = field(default_factory=list)
    without_partner: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As `evaluation.json` has it."""
        return asdict(self)

    def problems(self) -> str | None:
        """What is not finite, if anything is."""
        if self.not_finite:
            place, n_bad = max(self.not_finite.items(), key=lambda item: item[1])
            return f"held-out {advice(n_bad, self.n_tokens, place)}"
        named = {**self.as_metrics(), "eval/l0_p5": self.l0_p5, "eval/l0_p95": self.l0_p95}
        undefined = {f"eval/fvu/{name}" for name in self.constant}
        if len(self.constant) == len(self.fvu_by_position):
            undefined.add("eval/fvu")
        bad = [name for name, value in named.items() if not math.isfinite(value) and name not in undefined]
        if not bad:
            return None
        return (
            f"held-out figures are not finite: {', '.join(bad[:3])}; the activations are, so an output has overflowed"
        )

    def check_finite(self) -> None:
        """Say what is far out.

        Raises:
            NotFinite: what is not finite.
        """
        for place in self.constant:
            log.warning("held-out activations do not vary at %s: there is no FVU", place)
        for place, found in self.far_out.items():
            log.warning(
                "%d of %d held-out tokens are up to %.0f times as long as the median at %s: they may outweigh all others; "
                "data.max_norm_ratio: %d leaves such tokens out",
                found.tokens, self.n_tokens, found.largest, place, FAR_OUT,
            )  # fmt: skip
        if problems := self.problems():
            raise NotFinite(f"{problems}; what is not finite is null in the figures")

    def loss_recovered_by_position(self) -> dict[str, float | None]:
        """None where zeros do not hurt the language model."""
        return {name: found.loss_recovered for name, found in self.loss_recovered.items()}

    def as_metrics(self) -> dict[str, float]:
        """Scalars as they stand in `metrics.jsonl`."""
        scalars = {"fvu": self.fvu, "l0": self.l0, "dead_fraction": self.dead_fraction}
        if self.l0_train_mode is not None:
            scalars["l0_train_mode"] = self.l0_train_mode
        scalars |= {f"fvu/{name}": value for name, value in self.fvu_by_position.items()}
        for prefix in self.prefixes:
            scalars |= {f"fvu_of_first/{prefix.n_latents}": prefix.fvu, f"l0_of_first/{prefix.n_latents}": prefix.l0}
        for name, found in self.loss_recovered.items():
            if found.loss_recovered is not None:
                scalars[f"loss_recovered/{name}"] = found.loss_recovered
            scalars |= {f"ce_spliced/{name}": found.ce_spliced, f"kl_spliced/{name}": found.kl_spliced}
        if self.replacement_model is not None:
            found = self.replacement_model
            scalars |= {
                f"{figure}_{way}": value for figure in ("ce", "kl") for way, value in getattr(found, figure).items()
            }
        return {f"eval/{name}": value for name, value in scalars.items()}


Evaluate = Callable[[BaseCrosscoder, Tensor | None], EvaluationResult]
"""Held-out figures of a model and the `scaling_MP` that is not folded into it (None: it is folded in)."""


@full_precision()
@torch.no_grad()
def measure_reconstruction(
    model: BaseCrosscoder,
    raw_batches: Iterable[Tensor | tuple[Tensor, Tensor]],
    split: Split,
    position_names: Sequence[str],
    scaling_MP: Tensor | None = None,
    max_rows: int = 4096,
    groupings: Groupings | None = None,
) -> EvaluationResult:
    """Figures in eval mode (BatchTopK by threshold) on raw activations, in float32 whatever training computes in.

    Args:
        model: either folded, or in training, with the scaling in `scaling_MP`.
        raw_batches: `acts_BMPD`, unscaled; with `groupings` beside `group_BG` (int64), the numbers of each token's groups.
        split: how they become the model's input and target.
        position_names: one name per flattened output position.
        max_rows: tokens passed to the model at once.
        groupings: ways to group tokens, of which the figures are given apart, too.

    Raises:
        InputError: `scaling_MP` for a folded model, or none for one that is not.
    """
    if model.is_folded == (scaling_MP is not None):
        raise InputError("evaluate: give scaling_MP for a model without folded scaling, and only for such a model")
    seen = HeldoutSums(model, groupings or {})
    with RawModel(model, split, scaling_MP) as raw_model:
        for batch in raw_batches:
            whole_BMPD, group_BG = (batch, None) if isinstance(batch, Tensor) else batch
            for first in range(0, len(whole_BMPD), max_rows):
                part = slice(first, first + max_rows)
                seen.add(raw_model, whole_BMPD[part].to(model.device), None if group_BG is None else group_BG[part])
    return seen.result(position_names)


class HeldoutSums:
    """Sums over a held-out set."""

    def __init__(self, model: BaseCrosscoder, groupings: Groupings):
        self.fvu = FvuAccumulator(model.out_dims)
        self.groups, self.prefixes = ByGroup(groupings, partial(GroupSums, model.out_dims)), PrefixSums(model)
        self.l0_parts: list[Tensor] = []
        self.norm_parts: list[Tensor] = []
        self.counts_L: Tensor | int = 0
        self.max_L: Tensor | None = None
        self.n_active_train_mode: Tensor | int | None = None
        if any(fn.selects_over_batch for fn in model.activation_fns):
            self.n_active_train_mode = 0

    def add(self, raw_model: RawModel, raw_BMPD: Tensor, group_BG: Tensor | None) -> None:
        model, input_BXiDi = raw_model.model, raw_model.input(raw_BMPD)
        result = model.forward_train(input_BXiDi)
        target_BXoDo = raw_model.split.activations(raw_BMPD)[1]
        output_BXoDo, l0_B = raw_model.raw(result.output_BXoDo), result.latents.l0_B()
        self.fvu.update(target_BXoDo, output_BXoDo)
        self.prefixes.add(raw_model, result, target_BXoDo)
        for sums, of_group_B in self.groups.of(group_BG):
            own_B = of_group_B.to(l0_B.device)
            sums.add(target_BXoDo[own_B], output_BXoDo[own_B], l0_B[own_B])
        self.norm_parts.append(norms_of(target_BXoDo).reshape(len(target_BXoDo), -1))
        self.l0_parts.append(l0_B)
        self.counts_L = result.latents.firing_counts_L() + self.counts_L
        max_L = result.latents.max_L()
        self.max_L = max_L if self.max_L is None else torch.maximum(self.max_L, max_L)
        if self.n_active_train_mode is not None:
            model.train()
            self.n_active_train_mode = model.encode_latents(input_BXiDi).l0_B().sum() + self.n_active_train_mode
            model.eval()

    def result(self, position_names: Sequence[str]) -> EvaluationResult:
        """Waits for the device."""
        fvu_X, n_tokens = self.fvu.fvu_Xo().flatten().tolist(), self.fvu.n_tokens
        counts_L, l0_N = torch.as_tensor(self.counts_L), torch.cat(self.l0_parts).double()
        max_L = torch.zeros_like(counts_L) if self.max_L is None else self.max_L
        n_active, norm_NX = self.n_active_train_mode, torch.cat(self.norm_parts)
        not_finite_X = (~norm_NX.isfinite()).sum(0).tolist()
        ratio_NX = (norm_NX / norm_NX.nanmedian(0).values).where(norm_NX.isfinite(), 0.0)
        far_X = zip((ratio_NX > FAR_OUT).sum(0).tolist(), ratio_NX.amax(0).tolist(), strict=True)
        return EvaluationResult(
            n_tokens=n_tokens,
            fvu=self.fvu.fvu(),
            fvu_by_position=dict(zip(position_names, fvu_X, strict=True)),
            l0=float(l0_N.mean()),
            l0_p5=_quantile(l0_N, 0.05),
            l0_p95=_quantile(l0_N, 0.95),
            dead_fraction=float((counts_L == 0).double().mean()),
            density_L=(counts_L.double() / n_tokens).tolist(),
            max_activation_L=max_L.tolist(),
            l0_train_mode=None if n_active is None else float(n_active) / n_tokens,
            constant=[
                name for name, value in zip(position_names, self.fvu.variance_X().tolist(), strict=True) if value == 0
            ],
            groups=self.groups.result(lambda sums: sums.result(position_names)),
            not_finite={name: n for name, n in zip(position_names, not_finite_X, strict=True) if n},
            prefixes=self.prefixes.result(n_tokens),
            far_out={name: FarOut(*far) for name, far in zip(position_names, far_X, strict=True) if far[0]},
        )


def _quantile(values_N: Tensor, q: float) -> float:
    """With linear interpolation, for any number of values (`torch.quantile` stops at 2**24)."""
    place = q * (values_N.shape[0] - 1)
    low = values_N.kthvalue(math.floor(place) + 1).values
    high = values_N.kthvalue(math.ceil(place) + 1).values
    return float(low + (high - low) * (place - math.floor(place)))
