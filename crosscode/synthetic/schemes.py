"""The crosscoders that are compared on planted dictionaries: what each scheme is made of.

Axes: M models · P hookpoints · D width · L latents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from crosscode_kernels import BackendName

from crosscode.config.experiment import TrainConfig
from crosscode.config.registry import Component
from crosscode.errors import InputError
from crosscode.models import ACTIVATIONS, INITIALIZATIONS, ModelHookpointAcausalCrosscoder
from crosscode.models.initialization import InitStrategy
from crosscode.objectives import Objective, objective_from

_AUXK = {"auxk": {"k_aux": 32, "dead_after_tokens": 10_000}}
# Over the whole batch weak latents lose more often, so that more of them must be brought back.
_STRONG_AUXK = {"auxk": {"k_aux": 64, "dead_after_tokens": 5_000, "weight": 1.0}}
_TRANSPOSE = {"type": "anthropic_transpose"}
_JAN = {"type": "jan_update", "initial_approx_firing_pct": 0.05, "n_calibration_tokens": 4096}
_ADAM = {"type": "adam", "lr": 4e-3}
# Thresholds that move as fast as weights run away before the weights have found their features.
_ADAM_SLOW_THRESHOLDS = {"type": "adam", "lr": 5e-3, "threshold_lr_factor": 0.1}


class SyntheticScheme:
    """A scheme for `k` active latents of `n_latents`; `penalty` multiplies the coefficient of an L1 or tanh term.

    Coefficients are tuned by hand to about 8 active latents on the default dictionary.
    """

    def __init__(self, name: str, k: int, n_latents: int, shared_fraction: float, penalty: float = 1.0):
        if name not in SCHEMES:
            raise InputError(f"schemes: unknown scheme {name!r}; available: {', '.join(SCHEMES)}")
        self.name, self.n_latents, self.penalty = name, n_latents, penalty
        is_diffing = name.startswith("feb_update")
        self.n_shared_latents = round(shared_fraction * n_latents) if is_diffing else 0
        parts = SCHEMES[name](k, n_latents, penalty)
        self.is_penalised = bool(parts["objective"].keys() & {"l1", "tanh"})
        self.parts = parts
        if is_diffing:
            parts["init"] = {"type": "identical_latents", "first": parts["init"]}

    def model(self, dims: tuple[int, int, int], backend: BackendName) -> ModelHookpointAcausalCrosscoder:
        """An uninitialised crosscoder over `(M, P, D)`."""
        activation = ACTIVATIONS.build(self.parts["activation"], n_latents=self.n_latents)
        return ModelHookpointAcausalCrosscoder(
            *dims, self.n_latents, activation, n_shared_latents=self.n_shared_latents, backend=backend
        )

    def objective(self) -> Objective:
        terms = {"recon": {}, **self.parts["objective"]}
        return objective_from({name: Component(type=name, **fields) for name, fields in terms.items()})

    def init(self) -> InitStrategy:
        return INITIALIZATIONS.build(self.parts["init"])

    def train_config(self, n_steps: int, batch_size: int) -> TrainConfig:
        return TrainConfig(
            n_tokens=n_steps * batch_size,
            batch_size=batch_size,
            optimizer=Component(**self.parts["optimizer"]),
            log_every=max(1, n_steps // 5),
        )


def _ramp(value: float) -> dict[str, Any]:
    return {"type": "linear_ramp", "value": value, "ramp_fraction": 0.3}


def _scheme(activation: Any, objective: Any, init: Any = _TRANSPOSE, optimizer: Any = _ADAM) -> dict[str, Any]:
    return {"activation": activation, "objective": objective, "init": init, "optimizer": optimizer}


def _l1(k: int, n_latents: int, penalty: float) -> dict[str, Any]:
    return _scheme({"type": "relu"}, {"l1": {"weight": _ramp(3.5 * penalty)}})


def _topk(kind: str, k: int, n_latents: int, auxk: Any = _AUXK, **options: Any) -> dict[str, Any]:
    annealed = {"k_start": min(4 * k, n_latents), "k_anneal_fraction": 0.5}
    return _scheme({"type": kind, "k": k, **annealed, **options}, auxk)


def _batch_topk(k: int, n_latents: int, penalty: float) -> dict[str, Any]:
    return _topk("batch_topk", k, n_latents, _STRONG_AUXK, threshold_ema_decay=0.99)


def _jumprelu(penalty: float, **options: Any) -> dict[str, Any]:
    objective = {"tanh": {"weight": _ramp(penalty), **options}, "pre_act": {"weight": 1e-3, **options}}
    return _scheme({"type": "jumprelu"}, objective, _JAN, _ADAM_SLOW_THRESHOLDS)


SCHEMES: dict[str, Callable[[int, int, float], dict[str, Any]]] = {
    "l1_crosscoder": _l1,
    "topk_crosscoder": lambda k, n_latents, penalty: _topk("topk", k, n_latents),
    "batch_topk_crosscoder": _batch_topk,
    "groupmax_crosscoder": lambda k, n_latents, penalty: _scheme({"type": "groupmax", "k": k}, _AUXK),
    "jan_update_crosscoder": lambda k, n_latents, penalty: _jumprelu(penalty),
    "feb_update_diffing_topk": lambda k, n_latents, penalty: _topk("topk", k, n_latents),
    "feb_update_diffing_jumprelu": lambda k, n_latents, penalty: _jumprelu(penalty, shared_ratio=0.2),
}
"""By recipe: `(k, n_latents, penalty) -> activation, objective, init, optimizer`."""
