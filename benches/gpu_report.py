"""What `gpu.py` found, as Markdown."""

from __future__ import annotations

from typing import Any

HEADINGS = {
    "machine": "Machine",
    "ops": "Ops against float64 (checks that failed)",
    "optimizer": "Fused Adam against PyTorch's formulas (ms: norm and step, copies of tensors with them)",
    "recipes": "A training step of each recipe that may not wait for the device",
    "graphs": "Training steps captured as graphs",
    "captured training": "The trainer with captured steps beside eager ones (`train.cuda_graph`; ms of a step of a tiny model)",
    "op times": "Ops, ms (predicted: the traffic model, not a measurement)",
    "step times": "Whole training steps (predicted: the traffic model, not a measurement)",
    "other libraries": "Decoder and loss, forward and backward, against other libraries",
    "whole run": "The recipe `demo`: where the time goes",
}


def report(found: dict[str, list[dict[str, Any]]]) -> str:
    """All sections, as tables."""
    parts = ["# crosscode on " + next((row["name"] for row in found["machine"] if "name" in row), "an unknown device")]
    for name, rows in found.items():
        parts += [f"## {HEADINGS[name]}", ""]
        if name == "machine":
            parts += [
                f"- {row.pop('fact', '')}: " + ", ".join(f"{k} {v}" for k, v in row.items()) for row in map(dict, rows)
            ]
        elif name == "ops":
            bad = [row for row in rows if not row["ok"]]
            same = sum(bool(row.get("same_bits")) for row in rows)
            parts += [
                f"{len(rows) - len(bad)} of {len(rows)} within the allowed error; {same} gave the same bits twice.",
                "",
            ]
            parts += table(bad)
        else:
            parts += table([_with_ratio(row) for row in rows])
        parts.append("")
    return "\n".join(parts)


def _with_ratio(row: dict[str, Any]) -> dict[str, Any]:
    """`over_predicted`: measured over predicted."""
    if row.get("predicted_ms") and row.get("ms"):
        return row | {"over_predicted": row["ms"] / row["predicted_ms"]}
    return row


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown lines: a column for each key that any row has."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    if not rows:
        return ["Nothing."]
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    return lines + ["| " + " | ".join(_cell(row.get(key)) for key in keys) + " |" for row in rows]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/").replace("\n", " ")
