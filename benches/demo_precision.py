"""The recipe `demo_tuned` as it ships, in float32, under bfloat16, and compiled: the same held-out figures and losses?

    python benches/demo_precision.py float32        # first: what the others are compared with
    python benches/demo_precision.py bfloat16
    python benches/demo_precision.py compiled

Each is one whole run of the recipe `demo_tuned` in a temporary folder. What it found joins
`benches/results/demo_precision.json`, and the comparison is printed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from crosscode.build.schema import check_config, read_yaml
from crosscode.commands.train import run_training

RESULTS = Path(__file__).parent / "results" / "demo_precision.json"
VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"precision": "bfloat16"},
    "compiled": {"compile": True},
}
EARLY_STEPS = 50


def run(variant: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        values = read_yaml("demo_tuned")
        values["run_dir"] = f"{folder}/run"
        values["train"] |= VARIANTS[variant]
        run_training(check_config(values))
        path = Path(folder) / "run"
        evaluation = json.loads((path / "evaluation.json").read_text())
        summary = json.loads((path / "summary.json").read_text())
        rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    names = ("fvu", "fvu_by_position", "l0", "dead_fraction")
    return {
        **{name: evaluation[name] for name in names},
        "loss_recovered": {name: found["loss_recovered"] for name, found in evaluation["loss_recovered"].items()},
        "losses": {row["step"]: row["loss"] for row in rows if "loss" in row},
        "tokens_per_s": summary["tokens_per_s"],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def compare(found: dict[str, Any], exact: dict[str, Any]) -> list[str]:
    lines = [
        f"FVU {found['fvu']:.5f}, {100 * (found['fvu'] / exact['fvu'] - 1):+.2f} % of float32's {exact['fvu']:.5f}"
    ]
    for name, fvu in found["fvu_by_position"].items():
        lines.append(f"  {name}: {fvu:.5f}, {100 * (fvu / exact['fvu_by_position'][name] - 1):+.2f} %")
    ratios = {int(step): abs(loss / exact["losses"][step] - 1) for step, loss in found["losses"].items()}
    early = max(ratio for step, ratio in ratios.items() if step <= EARLY_STEPS)
    lines.append(
        f"losses: largest relative difference {early:.1e} up to step {EARLY_STEPS}, {max(ratios.values()):.1e}"
    )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="*", help=f"what to run: {', '.join(VARIANTS)} (default: only compare)")
    options = parser.parse_args()
    for variant in options.variants:
        if variant not in VARIANTS:
            parser.error(f"unknown variant {variant!r}; there are {', '.join(VARIANTS)}")
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for variant in options.variants:
        results[variant] = json.loads(json.dumps(run(variant)))
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    for variant, found in results.items():
        if variant != "float32":
            print(variant, *compare(found, results["float32"]), sep="\n  ")


if __name__ == "__main__":
    main()
