"""The schemes that are compared on planted dictionaries, as plain values: what each is made of. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_AUXK = {"auxk": {"k_aux": 32, "dead_after_tokens": 10_000}}
# Over the whole batch weak latents lose more often, so that more of them must be brought back.
_STRONG_AUXK = {"auxk": {"k_aux": 64, "dead_after_tokens": 5_000, "weight": 1.0}}
_TRANSPOSE = {"type": "anthropic_transpose"}
_ADAM = {"type": "adam", "lr": 4e-3}
# Thresholds that move as fast as weights run away before the weights have found their features.
_ADAM_SLOW_THRESHOLDS = {"type": "adam", "lr": 5e-3, "threshold_lr_factor": 0.1}


def _jan(k: int, n_latents: int) -> dict[str, Any]:
    share = min(2 * k / n_latents, 0.05)  # of many latents twice as many fire at the start as are wanted
    return {"type": "jan_update", "initial_approx_firing_pct": share, "n_calibration_tokens": 4096}


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


def _jumprelu(k: int, n_latents: int, penalty: float, **options: Any) -> dict[str, Any]:
    objective = {"tanh": {"weight": _ramp(penalty), **options}, "pre_act": {"weight": 1e-3, **options}}
    return _scheme({"type": "jumprelu"}, objective, _jan(k, n_latents), _ADAM_SLOW_THRESHOLDS)


def _wanted_l0(k: int, n_latents: int, penalty: float) -> dict[str, Any]:
    activation = {"type": "jumprelu", "thresholds": "linear"}
    objective = {"l0": {"target": k}, "pre_act": {"weight": 1e-3}}
    return _scheme(activation, objective, _jan(k, n_latents), {"type": "adam", "lr": 5e-3})


SCHEMES: dict[str, Callable[[int, int, float], dict[str, Any]]] = {
    "l1_crosscoder": _l1,
    "topk_crosscoder": lambda k, n_latents, penalty: _topk("topk", k, n_latents),
    "batch_topk_crosscoder": _batch_topk,
    "groupmax_crosscoder": lambda k, n_latents, penalty: _scheme({"type": "groupmax", "k": k}, _AUXK),
    "jan_update_crosscoder": _jumprelu,
    "wanted_l0_crosscoder": _wanted_l0,
    "feb_update_diffing_topk": lambda k, n_latents, penalty: _topk("topk", k, n_latents),
    "feb_update_diffing_jumprelu": lambda *given: _jumprelu(*given, shared_ratio=0.2),
}
"""By recipe: `(k, n_latents, penalty) -> activation, objective, init, optimizer`."""
