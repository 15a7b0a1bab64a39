"""The last figures of a run."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any

from crosscode.evaluation.heldout import EvaluationResult
from crosscode.models.base import BaseCrosscoder
from crosscode.runs.metrics import Metrics

PACKAGES = ("crosscode", "torch", "triton", "transformers", "transformer-lens", "datasets", "safetensors")


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    found = {"python": sys.version.split()[0], "platform": platform.platform()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def tokens_per_s(counts: Mapping[str, float]) -> float:
    """Tokens trained on per second, harvest included, evaluation and checkpoints not."""
    return counts["tokens"] / counts["seconds"] if counts["seconds"] else 0.0


def summary(
    model: BaseCrosscoder,
    counts: Mapping[str, float],
    metrics: Metrics,
    position_names: Sequence[str],
    evaluation: EvaluationResult | None,
    callback_figures: Iterable[str] = (),
) -> dict[str, Any]:
    """Held-out figures where there are some, else those of the last training batch.

    Args:
        counts: `step`, `tokens` and `seconds` of training.
        callback_figures: names in the metrics that are callbacks'.
    """
    last = metrics.last
    positions = {name: last.get(f"fvu/{name}") for name in position_names}
    return {
        "step": counts["step"],
        "tokens": counts["tokens"],
        "loss": last.get("loss"),
        "fvu": evaluation.fvu if evaluation else last.get("fvu"),
        "fvu_by_position": evaluation.fvu_by_position if evaluation else positions,
        "figures_from": "held-out data" if evaluation else "last training batch",
        "l0": evaluation.l0 if evaluation else last.get("l0"),
        "dead_fraction": evaluation.dead_fraction if evaluation else last.get("dead_fraction"),
        "dead_fraction_training": last.get("dead_fraction"),
        "loss_recovered": evaluation.loss_recovered_by_position() if evaluation else {},
        "groups": evaluation.to_json()["groups"] if evaluation else {},
        "without_partner": evaluation.without_partner if evaluation else None,
        "callbacks": {name: last.get(name) for name in sorted(callback_figures)},
        "tokens_per_s": tokens_per_s(counts),
        "wall_s": counts["seconds"],
        "backend": model.ops.name,
        "device": str(model.device),
        "versions": versions(),
        "n_metrics": metrics.n_rows,
    }
