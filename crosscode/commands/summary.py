"""What a user sees at the end of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any


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
