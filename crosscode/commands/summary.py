"""The last figures of a run."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from crosscode.evaluation.evaluation import EvaluationResult
from crosscode.trainers.trainer import Trainer

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


def write_summary(trainer: Trainer, evaluation: EvaluationResult | None) -> dict[str, Any]:
    """`summary.json`: held-out figures where there are some, else those of the last training batch."""
    last = trainer.metrics.last
    positions = {name: last.get(f"fvu/{name}") for name in trainer.position_names}
    summary = {
        "step": trainer.step,
        "tokens": trainer.tokens,
        "loss": last.get("loss"),
        "fvu": evaluation.fvu if evaluation else last.get("fvu"),
        "fvu_by_position": evaluation.fvu_by_position if evaluation else positions,
        "figures_from": "held-out data" if evaluation else "last training batch",
        "l0": evaluation.l0 if evaluation else last.get("l0"),
        "dead_fraction": evaluation.dead_fraction if evaluation else last.get("dead_fraction"),
        "dead_fraction_training": last.get("dead_fraction"),
        "loss_recovered": evaluation.loss_recovered_by_position() if evaluation else {},
        "tokens_per_s": trainer.tokens_per_s,
        "wall_s": trainer.seconds,
        "backend": trainer.model.ops.name,
        "device": str(trainer.model.device),
        "versions": versions(),
    }
    trainer.run.write_summary(summary)
    return summary


def print_figures(run: Path, summary: dict[str, Any]) -> None:
    """What a user sees at the end of a run in the folder `run`."""
    print(f"run         {run}")
    print(f"model       {run / 'final'}")
    for name, value in summary["fvu_by_position"].items():
        print(f"FVU         {value:.4f}  {name}")
    for name, value in summary["loss_recovered"].items():
        shown = "zeros do not hurt here" if value is None else f"{value:.4f}"
        print(f"recovered   {shown}  {name}")
    print(f"L0          {summary['l0']:.1f}")
    print(f"dead        {100 * summary['dead_fraction']:.2f} % of latents")
    print(f"speed       {summary['tokens_per_s']:.0f} tokens/s ({summary['backend']} backend, {summary['device']})")
