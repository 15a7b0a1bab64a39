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
from static_tensors import CASES, Case
from step_model import Run, card, topk_step
from traffic_model import (
    CACHE_SHARE,
    DEAD_FRACTION,
    DEVICES,
    GEMM_EFFICIENCY,
    LIMIT,
    MEMORY_EFFICIENCY,
    Device,
    Model,
    Term,
    judged,
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


RUNS = (
    Run(), Run(fused=True), Run(fused=True, moments=torch.bfloat16), Run(fused=True, row_sparse=True),
    Run(dead=6554), Run(fused=True, dead=6554), Run(torch.float32), Run(torch.float32, fused=True),
    Run(torch.float32, tf32=True, fused=True),
)  # fmt: skip
"""Of which a step is predicted; 6554 are 5 % of 131,072."""


def _where(case: Case) -> str:
    return (
        f"{case.name}, B={case.n_tokens}, I={case.input_width}, O={case.output_width}, L={case.n_latents}, k={case.k}"
    )


def step_terms(case: Case, run: Run, device: Device) -> dict[str, tuple[Term, float]]:
    """By name: a term of the step and its predicted milliseconds."""
    as_set = card(device, run)
    terms = topk_step(case, run, as_set)
    return {term.name: (term, 1e3 * term.seconds(as_set, run.dtype.itemsize)) for term in terms if term.moved}


def step_ms(case: Case, run: Run, device: Device) -> float:
    return sum(ms for _, ms in step_terms(case, run, device).values())


def _slowest_ms(case: Case, run: Run, device: Device) -> float:
    """If nothing that a kernel waits for overlapped."""
    as_set = card(device, run)
    return sum(1e3 * sum(term.bounds(as_set, run.dtype.itemsize).values()) for term in topk_step(case, run, as_set))


def overview(case: Case) -> list[str]:
    """Steps of all runs, on all devices."""
    lines = [
        f"## Predicted TopK steps: {_where(case)}", "",
        "| run | " + " | ".join(f"{device.name} ms" for device in DEVICES) + " | H100 if nothing overlapped |",
        "|---|" + "---|" * (len(DEVICES) + 1),
    ]  # fmt: skip
    for run in RUNS:
        cells = [f"{step_ms(case, run, device):.1f}" for device in DEVICES]
        lines.append(f"| {run} | " + " | ".join(cells) + f" | {_slowest_ms(case, run, DEVICES[0]):.1f} |")
    return [*lines, ""]


def _step_table(case: Case, run: Run) -> list[str]:
    lines = [
        f"## Terms of the step: {_where(case)}, {run}", "",
        "| term | MB moved | " + " | ".join(f"{device.name} ms" for device in DEVICES) + " | H100: decided by |",
        "|---|---|" + "---|" * (len(DEVICES) + 1),
    ]  # fmt: skip
    columns = [step_terms(case, run, device) for device in DEVICES]
    for name, (term, _) in columns[0].items():
        cells = [f"{column[name][1]:.2f}" for column in columns]
        decided = term.bound(card(DEVICES[0], run), run.dtype.itemsize)
        lines.append(f"| {name} | {term.moved / 1e6:.0f} | " + " | ".join(cells) + f" | {decided} |")
    sums = [sum(ms for _, ms in column.values()) for column in columns]
    lines.append("| **step** | | " + " | ".join(f"**{ms:.2f}**" for ms in sums) + " | |")
    dominating = []
    for device, column, whole in zip(DEVICES, columns, sums, strict=True):
        name = max(column, key=lambda name: column[name][1])
        dominating.append(f"{device.name}: {name} ({column[name][1] / whole:.0%})")
    return [*lines, "", f"Dominating term: {'; '.join(dominating)}.", ""]


def report() -> str:
    """The whole document."""
    lines = [
        "# Traffic model: a prediction, not a measurement", "",
        f"GEMMs at {GEMM_EFFICIENCY:.0%} of peak (bf16, or IEEE float32), memory at {MEMORY_EFFICIENCY:.0%} of "
        f"peak bandwidth; {CACHE_SHARE:.0%} of the last cache holds what an op re-reads; parameters, gradients and "
        f"moments in float32 as the trainer has them, products in the dtype named; latents "
        f"uniformly popular; {DEAD_FRACTION:.0%} of latents dead. On NVIDIA cards also what the disassembly (compile matrix, "
        "Triton 3.7.1) says of instructions and of loads that wait for one another (`benches/sass.py`); a term takes the "
        "longest of these times, as if they overlapped.", "",
        f"The limit: an op moves at most {LIMIT} times the fewest bytes of its inputs and outputs. A GEMM may exceed it by "
        "reading x again from memory, where that takes less time than its arithmetic.", "",
    ]  # fmt: skip
    lines += overview(CASES[0])
    for run in RUNS:
        lines += _step_table(CASES[0], run)
    for dtype in (torch.bfloat16, torch.float32):
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
