"""An objective is data: named loss terms, each with a schedule for its coefficient.

Axes: B tokens · Xi/Xo input/output crosscoding dims · Di/Do widths · L latents.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from crosscode_kernels.blocks import row_blocks
from crosscode_kernels.decoder_norms import DecoderNorms
from crosscode_kernels.recon_loss import ReconLoss
from pydantic import BaseModel
from torch import Tensor

from crosscode.config.experiment import TrainConfig
from crosscode.config.registry import ConfigModel, Configured, Registry
from crosscode.errors import InputError
from crosscode.models.base import BaseCrosscoder, ForwardResult
from crosscode.objectives.schedules import Weight, as_schedule

log = logging.getLogger("crosscode")


class WholeBatch(NamedTuple):
    """What a part of a batch cannot know by itself. None: to be found in what is at hand.

    A variance is the squared distance from the mean over the batch, summed over positions and width; a scalar."""

    error_variance: Tensor | None = None
    """of the reconstruction error"""
    target_variance: Tensor | None = None
    firing_share_L: Tensor | None = None
    """on which share of the tokens each latent is active"""


NOT_LOOKED_AT = WholeBatch()


def batch_variance(rows_BO: Tensor) -> Tensor:
    """`mean_B sum_O (row - mean row)^2`."""
    mean_O = rows_BO.mean(0)
    norms = [torch.linalg.vector_norm(rows_BO[rows] - mean_O, dim=1) for rows in row_blocks(rows_BO)]
    return torch.cat(norms).square().mean()


@dataclass(frozen=True)
class LossContext:
    """Everything a loss term may look at, of one batch: `input_BXiDi` and `target_BXoDo` (scaled), and the `result` of
    `model.forward_train(input_BXiDi)`."""

    model: BaseCrosscoder
    input_BXiDi: Tensor
    target_BXoDo: Tensor
    result: ForwardResult
    tokens_since_fired_L: Tensor
    """tokens since each latent was last active, int64"""
    whole: WholeBatch = NOT_LOOKED_AT
    """of the whole batch, where only a part of it is at hand"""
    dead_after_tokens: int = TrainConfig.model_fields["dead_after_tokens"].default
    """from when on a latent counts as dead, for terms that have no number of their own"""
    longest_silence: int | None = None
    """a bound on `tokens_since_fired_L`, where one is known without waiting for the device"""

    _norms: list[DecoderNorms] = field(default_factory=list, repr=False)
    _recon: list[ReconLoss] = field(default_factory=list, repr=False)

    @property
    def decoder_norms(self) -> DecoderNorms:
        """Computed once per step, shared by all terms; differentiable."""
        # Not a cached_property: its lock cannot be traced by torch.compile.
        if not self._norms:
            self._norms.append(self.model.decoder_norms())
        return self._norms[0]

    def per_target_variance(self, loss: Tensor) -> Tensor:
        """A squared error (`loss`, a scalar) divided by the variance of the target: 1 for a model that always gives the mean. 0
        where there is no variance."""
        variance = self.whole.target_variance
        if variance is None:
            variance = batch_variance(self.target_BXoDo.flatten(1))
        has_variance = variance > 0
        return loss / torch.where(has_variance, variance, torch.ones_like(variance)) * has_variance

    @property
    def recon(self) -> ReconLoss:
        """The reconstruction loss, computed once per step, shared by all terms."""
        if not self._recon:
            self._recon.append(self.result.recon_loss(self.target_BXoDo))
        return self._recon[0]


class LossTerm(Configured, ABC):
    """One summand of the loss, before its coefficient. A subclass is one file in `terms/`; the `weight` in its config is
    what `objective_from` takes as the coefficient."""

    by_name = ("weight",)
    needs_whole_batch: bool = False
    """Whether it looks at `tokens_since_fired_L` or `whole`, which depend on the whole batch."""
    k_factors: tuple[int, ...] = ()
    """By what the term multiplies k (see `BaseCrosscoder.k_multiplied`)."""
    rising: bool = False
    """While training: whether the coefficient is still below what it ends at."""
    draws_l0: bool = False
    """Whether the term draws L0 to a target, for which it needs a coefficient."""
    capturable: bool = False
    """Whether a step with it can be a CUDA graph: of what changes from step to step it reads what lies on the device, and
    `form`. A subclass says so of itself."""

    @abstractmethod
    def __call__(self, context: LossContext) -> Tensor:
        """A scalar."""

    def check_model(self, model: BaseCrosscoder) -> None:
        """Raise `InputError` where this term cannot be used with the model."""

    def form(self, longest_silence: int | None, dead_after_tokens: int) -> Any:
        """What it computes in another way from one step to the next, as far as a `LossContext` with these numbers says."""
        return None

    # ---- for terms that steer by what they see

    def after_step(self, l0: Tensor, step: int, n_steps: int) -> None:
        """Called once per training step with `l0`, that of the whole batch, a scalar on the device."""

    def figures(self) -> dict[str, float]:
        """Figures for the metrics, by name; may wait for the device."""
        return {}

    def missed(self, l0: float) -> str | None:
        """What there is to say of a run that ended with this L0."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What goes into checkpoints; `{}`: nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The counterpart, for what was not `{}`."""


LONG = 10**9
"""Steps of a run in which every warm-up and ramp comes to its end."""
TERMS: Registry[Any] = Registry("objective.{type}", "crosscode.objectives.terms")


class FunctionTerm(LossTerm):
    """A function as a loss term, with coefficient 1 unless another is given.

    It sees whole batches: with `grad_accumulation` it is given the mean over the parts, as are other terms.
    """

    class Config(ConfigModel):
        weight: Weight = 1.0

    beside = ("function",)
    function: Callable[[LossContext], Tensor]

    def __call__(self, context: LossContext) -> Tensor:
        return self.function(context)


AnyTerm = LossTerm | Callable[[LossContext], Tensor]
Coefficient = Weight | Callable[[int, int], float]


def _weighted(name: str, given: AnyTerm | tuple[AnyTerm, Coefficient]) -> tuple[LossTerm, Callable[[int, int], float]]:
    term, *coefficient = given if isinstance(given, tuple) else (given,)
    if not callable(term) or len(coefficient) > 1:
        raise InputError(f"objective.{name} = {given!r}: must be a loss term, or (term, coefficient)")
    term = term if isinstance(term, LossTerm) else FunctionTerm(term)
    weight: Any = coefficient[0] if coefficient else getattr(term, "weight", 1.0)
    if isinstance(weight, bool) or not (isinstance(weight, (int, float)) or callable(weight)):
        raise InputError(f"objective.{name}: coefficient {weight!r} must be a number, or a schedule (step, n_steps)")
    return term, as_schedule(cast(Any, weight))


Coefficients = Mapping[str, float | Tensor]
"""Of the terms of a loss, by name; tensors are scalars on the device."""


@dataclass(frozen=True)
class Loss:
    """`total`, a scalar, is what is differentiated; `parts`, scalars by name, are the unweighted terms, detached, and `weights`
    their coefficients: `total = sum(weights[name] * parts[name])`."""

    total: Tensor
    parts: dict[str, Tensor]
    weights: Coefficients

    def weighted_parts(self) -> dict[str, Tensor]:
        """The summands of `total`, scalars."""
        return {name: self.weights[name] * value for name, value in self.parts.items()}

    def detached(self) -> Loss:
        """Without the graph, and what it keeps in memory."""
        return Loss(self.total.detach(), self.parts, self.weights)

    def times(self, share: float) -> Loss:
        """What a part of a batch adds to the mean over the whole; detached."""
        parts = {name: value * share for name, value in self.parts.items()}
        return Loss(self.total.detach() * share, parts, self.weights)

    def __add__(self, other: Loss) -> Loss:
        parts = {name: self.parts[name] + value for name, value in other.parts.items()}
        return Loss(self.total + other.total, parts, other.weights)


@dataclass(frozen=True, init=False)
class Objective:
    """Named terms with schedules `(step, n_steps) -> coefficient`. What is logged is what is trained.

    Given by name, as any of: `term` (its own coefficient), `(term, coefficient)`. A term is a `LossTerm`, or a function
    of the `LossContext` that gives a scalar; a coefficient is a number, or a schedule.

    Raises:
        InputError: no term, or something else.
    """

    terms: Mapping[str, tuple[LossTerm, Callable[[int, int], float]]] = field(default_factory=dict)

    def __init__(self, terms: Mapping[str, AnyTerm | tuple[AnyTerm, Coefficient]]) -> None:
        if not terms:
            raise InputError("objective: no loss term given; add at least `recon: {}`")
        object.__setattr__(self, "terms", {name: _weighted(name, given) for name, given in terms.items()})

    def check_model(self, model: BaseCrosscoder) -> None:
        """Raise `InputError` where a term does not fit the model, or cannot draw L0 where it should."""
        for name, (term, schedule) in self.terms.items():
            term.check_model(model)
            if term.draws_l0 and not schedule(LONG, LONG):
                raise InputError(
                    f"objective.{name}.weight: 0 at the end of a run, where nothing would draw L0 to its target"
                )

    def after_step(self, l0: Tensor, step: int, n_steps: int) -> None:
        """Let terms that steer know `l0`, that of the step, a scalar on the device."""
        for term, schedule in self.terms.values():
            term.rising = schedule(step, n_steps) < schedule(n_steps, n_steps)
            term.after_step(l0, step, n_steps)

    def figures(self) -> dict[str, float]:
        """Figures of the terms, as `FIGURE/TERM`."""
        return {
            f"{key}/{name}": value for name, (term, _) in self.terms.items() for key, value in term.figures().items()
        }

    def warn_if_missed(self, l0: float) -> None:
        """Say it in the log where a run ended with an L0 far off what a term wants."""
        for term, _ in self.terms.values():
            if (said := term.missed(l0)) is not None:
                log.warning(said)

    def state_dict(self) -> dict[str, Any]:
        """States of the terms that have one."""
        return {name: state for name, (term, _) in self.terms.items() if (state := term.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give terms back what `state_dict` had of them."""
        for name, of_term in state.items():
            self.terms[name][0].load_state_dict(of_term)

    def __call__(self, context: LossContext, step: int, n_steps: int) -> Loss:
        return self.weigh(self.values(context), self.coefficients(step, n_steps))

    def values(self, context: LossContext) -> dict[str, Tensor]:
        """The terms before their coefficients: differentiable scalars."""
        return {name: term(context) for name, (term, _) in self.terms.items()}

    def coefficients(self, step: int, n_steps: int) -> dict[str, float]:
        """What the schedules say of a step."""
        return {name: schedule(step, n_steps) for name, (_, schedule) in self.terms.items()}

    def weigh(self, values: Mapping[str, Tensor], coefficients: Coefficients) -> Loss:
        """The loss of a step from the `values` of its terms, scalars."""
        parts, weights = {}, {}
        total: Tensor | None = None
        for name in self.terms:
            value, weight = values[name], coefficients[name]
            weights[name] = weight.to(value.dtype) if isinstance(weight, Tensor) else weight
            parts[name] = value.detach()
            weighted = weights[name] * value
            total = weighted if total is None else total + weighted
        assert total is not None
        return Loss(total, parts, weights)


def objective_from(configs: Mapping[str, BaseModel]) -> Objective:
    """The objective of terms by name, each given by its config (which holds its coefficient as well)."""
    return Objective({name: TERMS.build(config) for name, config in configs.items()})
