"""The traffic model's report: bytes of each Triton op, and the training step that they predict.

    python benches/static_traffic.py [--out benches/results]

Exits with an error where an op moves more than it may.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from static_cases import CASES, Case
from traffic_model import (
    CACHE_SHARE,
    DEAD_FRACTION,
    DEVICES,
    GEMM_EFFICIENCY,
    LIMIT,
    MEMORY_EFFICIENCY,
    Device,
    Model,
    judged,
    topk_step,
)


def _op_table(case: Case, dtype: torch.dtype, device: Device) -> list[str]:
    name = str(dtype).removeprefix("torch.")
    lines = [
        f"## Bytes of each op: {case.name}, {name}, {device.name}", "",
        "| op | GFLOP | fewest MB | moved MB | bytes ratio | time ratio | decided by |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for term in judged(case, dtype, device):
        lines.append(
            f"| {term.name} | {term.flops / 1e9:.1f} | {term.fewest / 1e6:.1f} | {term.moved / 1e6:.1f} "
            f"| {term.ratio:.2f} | {term.excess(device, dtype.itemsize):.2f} | {term.bound(device, dtype.itemsize)} |"
        )
    model = Model(case, dtype, device)
    encode = [model.preacts(), model.row_select()]
    whole = model.B * model.I * model.e + model.L * (model.I + 1) * model.e + model.entries
    moved = sum(term.moved for term in encode)
    peak = device.flops_16 if model.e == 2 else device.flops_32
    lines += [
        "",
        f"Encode as a whole (x and W in, entries out): fewest {whole / 1e6:.0f} MB, moved {moved / 1e6:.0f} MB, ratio "
        f"{moved / whole:.2f}: pre-activations pass through memory between the GEMM and the select. The GEMM's "
        f"arithmetic takes {encode[0].flops / peak * 1e3:.1f} ms at peak, all these bytes "
        f"{moved / device.bandwidth * 1e3:.1f} ms.",
        "",
    ]
    return lines


def _step_table(case: Case, dtype: torch.dtype) -> list[str]:
    name = str(dtype).removeprefix("torch.")
    lines = [
        f"## Predicted TopK step: {case.name}, B={case.n_tokens}, I={case.input_width}, O={case.output_width}, "
        f"L={case.n_latents}, k={case.k}, {name}", "",
        "| term | " + " | ".join(f"{device.name} ms" for device in DEVICES) + " |",
        "|---|" + "---|" * len(DEVICES),
    ]  # fmt: skip
    steps = [topk_step(Model(case, dtype, device)) for device in DEVICES]
    times = [
        [term.seconds(device, dtype.itemsize) * 1e3 for term in step]
        for device, step in zip(DEVICES, steps, strict=True)
    ]
    for i, term in enumerate(steps[0]):
        lines.append(f"| {term.name} | " + " | ".join(f"{column[i]:.2f}" for column in times) + " |")
    lines.append("| **step** | " + " | ".join(f"**{sum(column):.2f}**" for column in times) + " |")
    dominating = [
        f"{device.name}: {steps[0][column.index(max(column))].name} ({max(column) / sum(column):.0%})"
        for device, column in zip(DEVICES, times, strict=True)
    ]
    return [*lines, "", f"Dominating term: {'; '.join(dominating)}.", ""]


def report() -> str:
    """The whole document."""
    lines = [
        "# Traffic model: a prediction, not a measurement", "",
        f"GEMMs at {GEMM_EFFICIENCY:.0%} of peak (bf16, or IEEE float32), memory at {MEMORY_EFFICIENCY:.0%} of "
        f"peak bandwidth; {CACHE_SHARE:.0%} of the last cache holds what an op re-reads; parameters, gradients and "
        f"moments in float32 as the trainer has them, products in the dtype named; latents "
        f"uniformly popular; {DEAD_FRACTION:.0%} of latents dead.", "",
        f"The limit: an op moves at most {LIMIT} times the fewest bytes of its inputs and outputs. A GEMM may exceed it by "
        "reading x again from memory, where that takes less time than its arithmetic.", "",
    ]  # fmt: skip
    for dtype in (torch.bfloat16, torch.float32):
        lines += _step_table(CASES[0], dtype)
        lines += _op_table(CASES[0], dtype, DEVICES[0])
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    text = report()
    print(text)
    (out / "traffic_model.md").write_text(text + "\n")
    rows = [
        {
            "case": case.name,
            "dtype": str(dtype),
            "device": device.name,
            **term._asdict(),
            "ratio": term.ratio,
            "excess": term.excess(device, dtype.itemsize),
            "decided_by": term.bound(device, dtype.itemsize),
            "within_limit": term.within_limit(device, dtype.itemsize),
        }
        for case in CASES
        for dtype in (torch.bfloat16, torch.float32)
        for device in DEVICES
        for term in judged(case, dtype, device)
    ]
    (out / "traffic_model.json").write_text(json.dumps(rows, indent=1) + "\n")
    over = [row for row in rows if not row["within_limit"]]
    for row in over:
        print(f"above {LIMIT}: {row['case']} {row['dtype']} {row['device']} {row['name']} {row['ratio']:.2f}")
    return bool(over)


if __name__ == "__main__":
    sys.exit(main())
