"""Every recipe in full, as it ships, and the figures of the README's scheme table.

    python benches/recipes.py run [NAME ...] [--runs FOLDER]     train these recipes (default: all that need no download)
    python benches/recipes.py table                              print the table from benches/results/recipes.json

Each recipe is trained by `crosscode train NAME` in a process of its own; its row replaces the one that was stored.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from crosscode.recipes import recipe_names, recipe_path

STORED = Path(__file__).parent / "results" / "recipes.json"
NEEDS_A_DOWNLOAD = {"smollm2_batch_topk_sae"}
FIGURES = (
    "tokens",
    "fvu",
    "fvu_by_position",
    "loss_recovered",
    "l0",
    "dead_fraction",
    "dead_fraction_training",
    "tokens_per_s",
    "wall_s",
    "backend",
    "device",
)


def train(name: str, folder: Path) -> dict[str, Any]:
    """One full run; its figures on held-out activations."""
    command = [str(Path(sys.executable).with_name("crosscode")), "train", name]
    subprocess.run([*command, "--run_dir", str(folder), "--overwrite", "true"], check=True)
    summary = json.loads((folder / "summary.json").read_text())
    evaluation = json.loads((folder / "evaluation.json").read_text())
    figures = {figure: summary[figure] for figure in FIGURES}
    return figures | {
        "l0_train_mode": evaluation["l0_train_mode"],
        "l0_p5": evaluation["l0_p5"],
        "l0_p95": evaluation["l0_p95"],
        "n_heldout_tokens": evaluation["n_tokens"],
        "load_average": os.getloadavg()[0],
        "versions": summary["versions"],
    }


def stored() -> dict[str, Any]:
    return json.loads(STORED.read_text()) if STORED.exists() else {"recipes": {}}


def run(names: list[str], runs: Path) -> None:
    for name in names:
        figures = train(name, runs / name)
        results = stored()
        results["machine"] = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        results["command"] = "crosscode train NAME"
        results["recipes"] = dict(sorted({**results["recipes"], name: figures}.items()))
        STORED.parent.mkdir(exist_ok=True)
        STORED.write_text(json.dumps(results, indent=1) + "\n")


def table() -> str:
    """Markdown, one row a recipe; FVU and L0 on held-out text, dead: silent on all of it."""
    lines = ["| recipe | what it trains | FVU | L0 | dead | tokens/s |", "|---|---|---|---|---|---|"]
    for name, row in stored()["recipes"].items():
        path = recipe_path(name)
        if path is None:
            raise SystemExit(f"{STORED.name} has a row for {name!r}, which is no recipe")
        title = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        cells = [f"{row['fvu']:.3f}", f"{row['l0']:.1f}", f"{100 * row['dead_fraction']:.1f} %"]
        lines.append(f"| `{name}` | {title} | {' | '.join(cells)} | {row['tokens_per_s']:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Full runs of the recipes, and their table.")
    commands = parser.add_subparsers(required=True, dest="command")
    runner = commands.add_parser("run", help="train recipes and store their figures")
    runner.add_argument("names", nargs="*", metavar="NAME", help="recipes (default: all that need no download)")
    runner.add_argument("--runs", type=Path, default=Path("runs/recipes"), help="folder of the runs")
    commands.add_parser("table", help="print the stored figures as markdown")
    options = parser.parse_args()
    if options.command == "table":
        print(table())
        return
    known = recipe_names()
    unknown = set(options.names) - set(known)
    if unknown:
        raise SystemExit(f"no such recipe: {', '.join(sorted(unknown))}; `crosscode recipes` lists them")
    run(options.names or [name for name in known if name not in NEEDS_A_DOWNLOAD], options.runs)


if __name__ == "__main__":
    main()
