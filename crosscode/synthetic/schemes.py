"""The schemes that are compared on planted dictionaries, as plain values: what each is made of. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any, NamedTuple


class Wanted(NamedTuple):
    """What a scheme is made for."""

    k: int
    """active latents"""
    n_latents: int
    penalty: float
    """factor on the coefficient of an L1 or tanh term"""
    n_shared: int
    """latents of all models, where a scheme tells these from latents of one"""
    n_models: int


_AUXK = {"auxk": {"k_aux": 32, "dead_after_tokens": 10_000}}
# Over the whole batch weak latents lose more often, so that more of them must be brought back.
_STRONG_AUXK = {"auxk": {"k_aux": 64, "dead_after_tokens": 5_000, "weight": 1.0}}
_TRANSPOSE = {"type": "anthropic_transpose"}
_ADAM = {"type": "adam", "lr": 4e-3}
# Thresholds that move as fast as weights run away before the weights have found their features.
_ADAM_SLOW_THRESHOLDS = {"type": "adam", "lr": 5e-3, "threshold_lr_factor": 0.1}


def _jan(wanted: Wanted) -> dict[str, Any]:
    share = min(2 * wanted.k / wanted.n_latents, 0.05)  # of many latents twice as many fire at the start as are wanted
    return {"type": "jan_update", "initial_approx_firing_pct": share, "n_calibration_tokens": 4096}


def _ramp(value: float) -> dict[str, Any]:
    return {"type": "linear_ramp", "value": value, "ramp_fraction": 0.3}


def _scheme(
    activation: Any, objective: Any, init: Any = _TRANSPOSE, optimizer: Any = _ADAM, **crosscoder: Any
) -> dict[str, Any]:
    return {
        "activation": activation, "objective": objective, "init": init, "optimizer": optimizer, "crosscoder": crosscoder,
    }  # fmt: skip


def _l1(wanted: Wanted) -> dict[str, Any]:
    return _scheme({"type": "relu"}, {"l1": {"weight": _ramp(3.5 * wanted.penalty)}})


def _topk(wanted: Wanted, **crosscoder: Any) -> dict[str, Any]:
    return _scheme(_annealed(wanted, "topk"), _AUXK, **crosscoder)


def _batch_topk(wanted: Wanted, terms: Any = MappingProxyType({}), **crosscoder: Any) -> dict[str, Any]:
    activation = _annealed(wanted, "batch_topk") | {"threshold_ema_decay": 0.99}
    return _scheme(activation, {**terms, **_STRONG_AUXK}, **crosscoder)


def _annealed(wanted: Wanted, kind: str) -> dict[str, Any]:
    return {"type": kind, "k": wanted.k, "k_start": min(4 * wanted.k, wanted.n_latents), "k_anneal_fraction": 0.5}


def _dedicated(wanted: Wanted) -> dict[str, Any]:
    n_own = (wanted.n_latents - wanted.n_shared) // wanted.n_models
    return _batch_topk(wanted, partition=[{"models": [m], "n_latents": n_own} for m in range(wanted.n_models)])


def _jumprelu(wanted: Wanted, terms: Any = MappingProxyType({}), **crosscoder: Any) -> dict[str, Any]:
    objective = {"tanh": {"weight": _ramp(wanted.penalty), **terms}, "pre_act": {"weight": 1e-3, **terms}}
    return _scheme({"type": "jumprelu"}, objective, _jan(wanted), _ADAM_SLOW_THRESHOLDS, **crosscoder)


def _wanted_l0(wanted: Wanted) -> dict[str, Any]:
    activation = {"type": "jumprelu", "thresholds": "linear"}
    objective = {"l0": {"target": wanted.k}, "pre_act": {"weight": 1e-3}}
    return _scheme(activation, objective, _jan(wanted), {"type": "adam", "lr": 5e-3})


SCHEMES: dict[str, Callable[[Wanted], dict[str, Any]]] = {
    "l1_crosscoder": _l1,
    "topk_crosscoder": _topk,
    "batch_topk_crosscoder": _batch_topk,
    "groupmax_crosscoder": lambda wanted: _scheme({"type": "groupmax", "k": wanted.k}, _AUXK),
    "jan_update_crosscoder": _jumprelu,
    "wanted_l0_crosscoder": _wanted_l0,
    "feb_update_diffing_topk": lambda wanted: _topk(wanted, n_shared_latents=wanted.n_shared),
    "feb_update_diffing_jumprelu": lambda wanted: _jumprelu(
        wanted, {"shared_ratio": 0.2}, n_shared_latents=wanted.n_shared
    ),
    "dedicated_feature_crosscoder": _dedicated,
    "delta_crosscoder": lambda wanted: _batch_topk(wanted, {"delta": {}}),
    "matryoshka_crosscoder": lambda wanted: _batch_topk(
        wanted, {"matryoshka": {}}, prefixes=[0.0625, 0.125, 0.25, 0.5]
    ),
}
"""By recipe: what of activation, objective, init, optimizer and further options of the crosscoder makes it up."""
