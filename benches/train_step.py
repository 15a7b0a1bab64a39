"""Full training steps on the CPU, fast backend against reference, in one run.

    python benches/train_step.py [--cases topk jumprelu_trained ...] [--repeats 9] [--threads 2] [--out FILE]

A step is forward, loss, backward, gradient clip and optimizer. The reference runs with stock `torch.optim.Adam`, the fast backend
with `fused=True` or, for beta1 = 0, row-sparse Adam. Each variant has its own process; they take turns within each repeat, so
that a noisy machine hits all of them. Reported are medians, and medians of the ratios within a repeat, of wall and of CPU
time. `encode` is the wall time of encoder product and selection, `rest` all else; `rows` counts the latents that are active
in the batch. Peak memory counts everything that is allocated during a step except gradients, buffers that the fast backend
keeps from step to step among it; "saved" counts what autograd keeps for backward, parameters excluded. `--out` renews
the rows of the cases that ran and keeps the others.

Axes: B tokens · I flattened input dims.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import statistics
import subprocess
import time
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from bare_step import Case, Step, batch, make_params, peak_bytes, saved_bytes
from crosscode_kernels import Backend, OpSet, resolve_backend
from crosscode_kernels.row_sparse_adam import RowSparseAdam
from torch import Tensor

CASES = {
    "topk": Case("topk"),
    "topk_auxk": Case("topk", k_aux=768),
    "topk_auxk_dead": Case("topk", k_aux=768, dead=0.05),
    "batch_topk": Case("batch_topk"),
    "groupmax": Case("groupmax"),
    "cross_layer_topk": Case("topk", I=512, O=6 * 512, L=8192, segments=6),
    "jumprelu_trained": Case("jumprelu", l0=60),
    "jumprelu_init": Case("jumprelu", l0=0.6 * 16384),
    "l1_trained": Case("l1", l0=60),
    "l1_init": Case("l1", l0=0.5 * 16384),
    **{f"topk_L{n}": Case("topk", B=256, L=n, beta1=0.0) for n in (4096, 8192, 16384, 32768, 65536)},
}
HERE = Path(__file__).parent
WARM_UP = 2


def make_step(case: Case, variant: str, x_BI: Tensor) -> Step:
    """`reference`, `torch`, or `torch-screened`."""
    params = make_params(case, x_BI)
    betas = (case.beta1, 0.999)
    if variant == "reference":
        return Step(case, resolve_backend("reference", "cpu"), params, torch.optim.Adam(params.values(), 5e-5, betas))
    row_sparse = case.beta1 == 0.0
    options = [option for option, on in (("screened", variant == "torch-screened"), ("rows", row_sparse)) if on]
    ops = OpSet(Backend("torch", tuple(options)))
    if row_sparse:
        return Step(case, ops, params, RowSparseAdam(params.values(), lr=5e-5, beta2=0.999))
    return Step(case, ops, params, torch.optim.Adam(params.values(), 5e-5, betas, fused=True))


def work(pipe: Connection, variant: str, threads: int) -> None:
    """The process of one variant: takes a case, then steps as it is told; answers with seconds: wall, CPU, encode."""
    torch.set_num_threads(threads)
    while (name := pipe.recv()) is not None:
        case = CASES[name]
        x_BI, target_BO = batch(case)
        step = make_step(case, variant, x_BI)
        while pipe.recv():
            wall, cpu = time.perf_counter(), time.process_time()
            step.run(x_BI, target_BO)
            pipe.send((time.perf_counter() - wall, time.process_time() - cpu, step.seconds["encode"]))
        with torch.no_grad():
            rows = int((step.encode(x_BI).firing_counts_L() > 0).sum())
        pipe.send((saved_bytes(step, x_BI, target_BO), peak_bytes(step, x_BI, target_BO), rows))


def measure(name: str, repeats: int, pipes: dict[str, Connection]) -> dict[str, Any]:
    times: dict[str, list[tuple[float, float, float]]] = {variant: [] for variant in pipes}
    for pipe in pipes.values():
        pipe.send(name)
    for repeat in range(repeats + WARM_UP):
        for variant, pipe in pipes.items():
            pipe.send(True)
            seconds = pipe.recv()
            if repeat >= WARM_UP:
                times[variant].append(seconds)
    row: dict[str, Any] = {"case": name, **asdict(CASES[name])}
    for variant, pipe in pipes.items():
        pipe.send(False)
        saved, peak, row["rows"] = pipe.recv()
        wall, cpu, encode = ([seconds[i] for seconds in times[variant]] for i in (0, 1, 2))
        row |= {f"{variant}_ms": 1e3 * statistics.median(wall), f"{variant}_cpu_ms": 1e3 * statistics.median(cpu)}
        row[f"{variant}_encode_ms"] = 1e3 * statistics.median(encode)
        row[f"{variant}_rest_ms"] = 1e3 * statistics.median(w - e for w, e in zip(wall, encode, strict=True))
        row |= {f"{variant}_saved_mb": saved / 2**20, f"{variant}_peak_mb": peak / 2**20}
        if len(wall) > 1:
            first, _, third = statistics.quantiles(wall, n=4)
            row[f"{variant}_quartiles_ms"] = [1e3 * first, 1e3 * third]
        if variant != "reference" and "reference" in times:
            for i, kind in enumerate(("ratio", "cpu_ratio")):
                pairs = zip(times["reference"], times[variant], strict=True)
                row[f"{variant}_{kind}"] = statistics.median(slow[i] / fast[i] for slow, fast in pairs)
    return row


def print_row(row: dict[str, Any], variants: list[str]) -> None:
    for variant in variants:
        ratios = (row.get(f"{variant}_ratio"), row.get(f"{variant}_cpu_ratio"))
        ratio = " ".join("      " if value is None else f"{value:5.2f}x" for value in ratios)
        print(
            f"{row['case']:>18} {variant:>15} {row[f'{variant}_ms']:8.1f} ms ({row[f'{variant}_cpu_ms']:7.0f} CPU) {ratio}"
            f" = encode {row[f'{variant}_encode_ms']:7.1f} + rest {row[f'{variant}_rest_ms']:7.1f}, {row['rows']} rows,"
            f" saved {row[f'{variant}_saved_mb']:7.1f} MiB  peak {row[f'{variant}_peak_mb']:7.1f} MiB",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--variants", nargs="+", default=["reference", "torch", "torch-screened"])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    pipes = {}
    for variant in arguments.variants:
        pipes[variant], theirs = context.Pipe()
        context.Process(target=work, args=(theirs, variant, arguments.threads), daemon=True).start()
    rows = []
    for name in arguments.cases:
        rows.append(measure(name, arguments.repeats, pipes))
        print_row(rows[-1], arguments.variants)
    for pipe in pipes.values():
        pipe.send(None)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        run = {"threads": arguments.threads, **provenance()}
        kept = json.loads(arguments.out.read_text())["rows"] if arguments.out.exists() else []
        found = {row["case"]: row for row in [*kept, *({**row, "run": run} for row in rows)]}
        ordered = [found[name] for name in CASES if name in found]
        arguments.out.write_text(json.dumps({"rows": ordered}, indent=1) + "\n")


def provenance() -> dict[str, str]:
    """Versions, machine and commit of a run."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=HERE)
    cpus = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {len(cpus)} x {cpus[0] if cpus else 'unknown'}",
        "commit": commit.stdout.strip() or "unknown",
    }


if __name__ == "__main__":
    main()
