"""Which scheme recovers what of a planted dictionary, all schemes at the same L0.

    python benches/synthetic.py run [SEED ...] [--dictionary NAME] [--scheme NAME]
                                                   train every scheme, or those (default: seeds 0 1, both dictionaries)
    python benches/synthetic.py table              print the table from benches/results/synthetic.json

Two dictionaries: independent features, and the same with features that fire together. L1 and JumpReLU schemes are
trained up to three times to find the penalty with which their L0 is that of the TopK styles.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from crosscode.commands.synthetic import as_json
from crosscode.files import json_text, write_text
from crosscode.synthetic.planted import PlantedConfig
from crosscode.synthetic.runs import SyntheticConfig, run_synthetic

STORED = Path(__file__).parent / "results" / "synthetic.json"
CORRELATIONS = {"independent": 0.0, "correlated": 0.8}
COLUMNS = ("all", "shared", "exclusive")


def run(seeds: list[int], dictionaries: list[str], schemes: list[str] | None) -> None:
    for seed in seeds:
        for name in dictionaries:
            correlation = CORRELATIONS[name]
            planted = PlantedConfig(correlation=correlation, seed=seed)
            config, key = SyntheticConfig(planted=planted, seed=seed, max_runs=3), f"{name}, seed {seed}"
            for result in run_synthetic(config.model_copy(update={"schemes": schemes or config.schemes})):
                print(f"{key}: {result}", file=sys.stderr, flush=True)
                stored = json.loads(STORED.read_text()) if STORED.exists() else {}
                rows = {row["scheme"]: row for row in stored.get(key, {}).get("schemes", [])}
                found = as_json(config, [result])
                rows[result.scheme] = found["schemes"][0]
                stored[key] = found | {"schemes": list(rows.values())}
                write_text(STORED, json_text(dict(sorted(stored.items())), indent=1) + "\n")


def table() -> str:
    """Markdown: means over the seeds, one table a dictionary."""
    stored = json.loads(STORED.read_text())
    lines = []
    for name in CORRELATIONS:
        runs = [value["schemes"] for key, value in stored.items() if key.startswith(name)]
        by_scheme: dict[str, list[dict[str, Any]]] = {}
        for row in itertools.chain(*runs):
            by_scheme.setdefault(row["scheme"], []).append(row)
        if not runs:
            continue
        lines += [
            f"{name.capitalize()} features:",
            "",
            "| scheme | seeds | L0 | FVU | dead | "
            + " | ".join([f"cos {column}" for column in COLUMNS] + ["max cos", "precision", "recall"])
            + " |",
            "|---|" + "---|" * 10,
        ]
        for scheme, rows in by_scheme.items():
            lines.append(f"| `{scheme}` | {len(rows)} | " + " | ".join(_cells(rows)) + " |")
        lines.append("")
    return "\n".join(lines)


def _cells(rows: list[dict[str, Any]]) -> list[str]:
    def mean(*path: str, digits: int = 3) -> str:
        values: list[Any] = list(rows)
        for key in path:
            values = [value[key] for value in values]
        defined = [value for value in values if value is not None]  # no call at all has no precision
        return f"{statistics.mean(defined):.{digits}f}" if defined else "-"

    figures = [mean("l0", digits=1), mean("fvu"), mean("dead_fraction")]
    figures += [mean("ground_truth", column, "matched_cosine") for column in COLUMNS]
    figures.append(mean("ground_truth", "all", "mean_max_cosine"))
    return [*figures, mean("ground_truth", "precision"), mean("ground_truth", "recall")]


def main() -> None:
    parser = argparse.ArgumentParser(description="Planted dictionaries: every scheme at the same L0.")
    commands = parser.add_subparsers(required=True, dest="command")
    runner = commands.add_parser("run", help="train and store the figures")
    runner.add_argument("seeds", nargs="*", type=int, default=[0, 1], metavar="SEED", help="default: 0 1")
    runner.add_argument("--dictionary", action="append", choices=list(CORRELATIONS), help="default: both")
    runner.add_argument("--scheme", action="append", metavar="NAME", help="default: every one")
    commands.add_parser("table", help="print the stored figures as markdown")
    options = parser.parse_args()
    if options.command == "table":
        print(table())
    else:
        run(options.seeds, options.dictionary or list(CORRELATIONS), options.scheme)


if __name__ == "__main__":
    main()
