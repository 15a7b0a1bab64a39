"""The README's tables of training steps, from what `benches/train_step.py --out` stored.

    python benches/step_table.py [--results benches/results/train_step.json]

B tokens · I, O flattened input and output dims · L latents · k entries per token.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

STORED = Path(__file__).parent / "results" / "train_step.json"
LABELS = {
    "topk": "TopK",
    "batch_topk": "BatchTopK",
    "groupmax": "GroupMax",
    "cross_layer_topk": "TopK, cross-layer (D = 512, 6 outputs, L = 8192)",
    "topk_L65536": "TopK, L = 65536, B = 256, beta1 = 0 (row-sparse Adam)",
    "jumprelu_trained": "JumpReLU with penalties, L0 about 60",
    "jumprelu_init": "JumpReLU with penalties, at init",
    "l1_trained": "ReLU with L1, L0 about 60",
    "l1_init": "ReLU with L1, at init",
}
AGAINST_L = [f"topk_L{n}" for n in (4096, 8192, 16384, 32768, 65536)]
SCREENED = ("topk", "cross_layer_topk")


def ratios(rows: dict[str, Any]) -> list[str]:
    """Markdown: each step against the reference."""
    lines = [
        "| step | `reference` | `torch` | ratio | `torch:screened` | ratio | saved for backward | peak |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, label in LABELS.items():
        row = rows[name]
        cells = [f"{row['reference_ms']:.0f} ms", f"{row['torch_ms']:.0f} ms", f"{row['torch_ratio']:.2f}x"]
        if name in SCREENED:
            cells += [f"{row['torch-screened_ms']:.0f} ms", f"{row['torch-screened_ratio']:.2f}x"]
        else:
            cells += ["", ""]
        cells += [
            f"{row[f'reference_{what}_mb']:.0f} -> {row[f'torch_{what}_mb']:.1f} MiB" for what in ("saved", "peak")
        ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return lines


def against_latents(rows: dict[str, Any]) -> list[str]:
    """Markdown: where a row-sparse step's time goes as L grows."""
    lines = [
        "| L | active rows | encode | rest of the step | rest per 1000 rows | `reference` |",
        "|---|---|---|---|---|---|",
    ]
    for row in (rows[name] for name in AGAINST_L):
        rest = row["torch_rest_ms"]
        lines.append(
            f"| {row['L']} | {row['rows']} | {row['torch_encode_ms']:.0f} ms | {rest:.0f} ms"
            f" | {1000 * rest / row['rows']:.1f} ms | {row['reference_ms']:.0f} ms |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=STORED)
    rows = {row["case"]: row for row in json.loads(parser.parse_args().results.read_text())["rows"]}
    print("\n".join([*ratios(rows), "", *against_latents(rows)]))


if __name__ == "__main__":
    main()
