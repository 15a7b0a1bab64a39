"""A whole training step on the CPU over the sum of the parts that no implementation can do without.

    python benches/step_parts.py [--cases crosscoder ...] [--repeats 9] [--threads 2] [--clock wall|cpu] [--out FILE]

The parts: one float32 encoder product, one fused Adam over all parameters, one norm of all gradients. They are timed in the same
process and in turns with the step (forward, AuxK, loss, backward, clip, Adam), so that the ratio is that of the machine at hand,
whatever else it does; reported are medians of the ratios within a repeat. A step with row-sparse Adam (betas 0 and 0.999) is
compared with the encoder product alone. The last column says where the rest goes: the parts of the step, each less its
unavoidable share, as multiples of the same sum. With more than one thread the CPU clock counts threads that wait.

Axes: B tokens · I flattened input dims · O flattened output dims · L latents.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bare_step import Case, Step, batch
from crosscode_kernels.row_sparse_adam import grad_norm
from torch import Tensor
from train_step import WARM_UP, make_step, provenance

CASES = {
    "sae": Case("topk", B=2048, I=768, O=768, L=12288, segments=1),
    "crosscoder": Case("topk", L=16384),
    "crosscoder_batch_topk": Case("batch_topk", L=16384),
    "cross_layer": Case("topk", I=512, O=6 * 512, L=8192, segments=6),
    "sae_L65536": Case("topk", I=768, O=768, L=65536, segments=1),
    "crosscoder_l1": Case("l1", L=16384, l0=60),
    "crosscoder_jumprelu": Case("jumprelu", L=16384, l0=290),
}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
UNAVOIDABLE = {"encode": "encode", "clip": "norm", "optimizer": "Adam"}
"""Which part of a step holds which unavoidable one."""


def variants(case: Case) -> dict[str, Case]:
    """The step without AuxK, with it while nothing is dead and with 5 % dead (where k is given), and with row-sparse Adam."""
    if case.l0:
        return {"plain": case, "row-sparse": replace(case, beta1=0.0)}
    k_aux = case.I // 2
    return {
        "plain": case,
        "AuxK": replace(case, k_aux=k_aux),
        "AuxK, 5 % dead": replace(case, k_aux=k_aux, dead=0.05),
        "row-sparse": replace(case, beta1=0.0),
    }


def parts_of(step: Step, x_BI: Tensor) -> dict[str, Callable[[], Any]]:
    """The unavoidable parts as calls, over tensors of their own."""
    params = [param.detach().clone().requires_grad_() for param in step.params.values()]
    for param in params:
        param.grad = torch.full_like(param, 1e-8)
    adam = torch.optim.Adam(params, 1e-8, fused=True)
    W_enc_LI, b_enc_L = step.params["W_enc_LI"].detach(), step.params["b_enc_L"].detach()
    out_BL = torch.empty(x_BI.shape[0], W_enc_LI.shape[0])
    return {
        "encode": lambda: torch.addmm(b_enc_L, x_BI, W_enc_LI.T, out=out_BL),
        "Adam": adam.step,
        "norm": lambda: grad_norm(params),
    }


def measure(case: Case, repeats: int, clock: Callable[[], float]) -> list[dict[str, Any]]:
    """A row for each variant of a case: times in ms and ratios, medians over repeats."""
    x_BI, target_BO = batch(case)
    steps = {name: make_step(variant, "torch", x_BI) for name, variant in variants(case).items()}
    for step in steps.values():
        step.clock = clock
    parts = parts_of(steps["plain"], x_BI)
    repeated: list[dict[str, dict[str, float]]] = []
    for repeat in range(repeats + WARM_UP):
        seconds: dict[str, dict[str, float]] = {"parts": {}}
        for name, call in parts.items():
            start = clock()
            call()
            seconds["parts"][name] = clock() - start
        for name, step in steps.items():
            step.run(x_BI, target_BO)
            seconds[name] = dict(step.seconds)
        if repeat >= WARM_UP:
            repeated.append(seconds)
    return [_row(name, repeated) for name in steps]


def _row(name: str, repeated: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    counted = ["encode"] if name == "row-sparse" else ["encode", "Adam", "norm"]
    bases = [sum(seconds["parts"][part] for part in counted) for seconds in repeated]

    def ratio(value: Callable[[dict[str, dict[str, float]]], float]) -> float:
        return statistics.median(value(seconds) / base for seconds, base in zip(repeated, bases, strict=True))

    def beyond(part: str) -> Callable[[dict[str, dict[str, float]]], float]:
        own = UNAVOIDABLE.get(part)
        return lambda seconds: seconds[name][part] - (seconds["parts"][own] if own in counted else 0.0)

    rest = {part: ratio(beyond(part)) for part in repeated[0][name]}
    return {
        "variant": name,
        "parts_ms": 1e3 * statistics.median(bases),
        "step_ms": 1e3 * statistics.median(sum(seconds[name].values()) for seconds in repeated),
        "ratio": ratio(lambda seconds: sum(seconds[name].values())),
        "rest": dict(sorted(rest.items(), key=lambda item: -item[1])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    print(
        "| case | step | unavoidable | whole | ratio | the rest, in multiples of the unavoidable |\n|---|---|---|---|---|---|"
    )
    for name in arguments.cases:
        for row in measure(CASES[name], arguments.repeats, CLOCKS[arguments.clock]):
            rows.append({"case": name, **row})
            rest = ", ".join(f"{part} {share:.2f}" for part, share in row["rest"].items())
            times = f"{row['parts_ms']:.0f} ms | {row['step_ms']:.0f} ms | {row['ratio']:.2f}x"
            print(f"| {name} | {row['variant']} | {times} | {rest} |", flush=True)
    if arguments.out:
        run = {"threads": arguments.threads, "clock": arguments.clock, **provenance()}
        arguments.out.write_text(json.dumps({"run": run, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
