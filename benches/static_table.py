"""The compile matrix as it is stored: every row as JSON, and a table of the worst of each kernel and target."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any


def write(rows: list[dict[str, Any]], folder: Path) -> None:
    header = textwrap.dedent(f"""\
        # Compile matrix

        {versions_of(rows)} No GPU involved. {len(rows)} compilations.
        Worst case over the configurations of a kernel; from hot loads on, where rows are aligned to 16 bytes.
        Loads in flight and instructions per byte: of the loop that loads most, per thread (`static_loops.py`; NVIDIA only).

        """)
    (folder / "compile_matrix.md").write_text(header + table(rows) + "\n")
    lines = ",\n".join(json.dumps(row) for row in rows)
    (folder / "compile_matrix.json").write_text(f"[\n{lines}\n]\n")


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line per kernel and target, worst case over its configurations."""
    lines = [
        "| kernel | target | configurations | registers | spills | shared memory | warps per SM/CU | hot loads (bit) "
        "| loads in flight | instructions per byte |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["target"]), []).append(row)
    for (kernel, target), group in sorted(groups.items()):
        built = [row for row in group if "error" not in row]
        if not built:
            lines.append(f"| `{kernel}` | {target} | {len(group)} | does not compile | | | | | | |")
            continue
        aligned = [row for row in built if row["aligned_rows"]]
        widths = sorted({width for row in aligned for width in row["hot_widths"]})
        in_flight = [row["loads_in_flight"] for row in aligned if row.get("loads_in_flight")]
        per_byte = [row["instructions_per_byte"] for row in aligned if row.get("instructions_per_byte")]
        lines.append(
            f"| `{kernel}` | {target} | {len(group)} | {max(r['registers'] for r in built)} "
            f"| {max(r['spills'] for r in built)} | {max(r['shared'] for r in built)} "
            f"| {min(r['warps_per_unit'] for r in built)} | {', '.join(map(str, widths)) or '-'} "
            f"| {min(in_flight, default='-')} | {max(per_byte, default='-')} |"
        )
    return "\n".join(lines)


def joined(rows: list[dict[str, Any]], stored: list[dict[str, Any]], every_case: bool) -> list[dict[str, Any]]:
    """The rows, and of the stored ones those that they do not replace: of other kernels or targets, or (unless every case was
    compiled) of other configurations."""

    def configuration(row: dict[str, Any]) -> str:
        keys = ("constants", "dtypes", "aligned", "num_warps")
        return "" if every_case else json.dumps([row[key] for key in keys], sort_keys=True)

    new = {(row["kernel"], row["target"], configuration(row)) for row in rows}
    kept = [row for row in stored if (row["kernel"], row["target"], configuration(row)) not in new]
    return kept + rows


def versions_of(rows: list[dict[str, Any]]) -> str:
    """Which compiler made which kernels."""
    kernels: dict[str, set[str]] = {}
    for row in rows:
        kernels.setdefault(row["triton"], set()).add(f"`{row['kernel']}`")
    most = max(kernels, key=lambda version: sum(row["triton"] == version for row in rows))
    others = [f"{', '.join(sorted(names))}: {version}" for version, names in kernels.items() if version != most]
    return f"Triton {most}{''.join(f'; {one}' for one in others)}."
