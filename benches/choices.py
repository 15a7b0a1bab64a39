"""What the choices of a run cost where they are wrong: every variant forced, beside the one that is chosen.

    python benches/choices.py [--cases NAME ...] [--repeats 20] [--threads 2] [--clock wall|cpu] [--out FILE]

Each shape has the choice made for it as a run makes it (`crosscode/build/choices.py`), then full training steps (forward, loss,
backward, clipping, Adam) of every variant in turns; the last column is the median of the chosen one's time over the fastest's,
within a repeat. Wanted: at most 1.05. On a busy machine: `--threads 1 --clock cpu`.

Axes: B tokens · I flattened input dims · O flattened output dims · L latents.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from bare_step import Case, Step, batch, make_params
from crosscode_kernels import Backend, OpSet
from step_parts import CLOCKS
from train_step import WARM_UP, provenance

from crosscode.build.choices import WORTH_TRYING, Trial

CASES = {
    "sae_L12288": Case("topk", B=2048, I=768, O=768, L=12288, segments=1),
    "sae_L65536": Case("topk", I=768, O=768, L=65536, segments=1),
    "crosscoder_topk": Case("topk"),
    "crosscoder_batch_topk": Case("batch_topk"),
    "crosscoder_l1_init": Case("l1", l0=0.5 * 16384),
    "crosscoder_l1_trained": Case("l1", l0=60),
    "crosscoder_jumprelu": Case("jumprelu", l0=290),
    "cross_layer": Case("topk", I=512, O=6 * 512, L=8192, segments=6),
}


def chosen(case: Case, clock: Callable[[], float]) -> Backend:
    """As a run of this shape would."""
    if case.B * case.I * case.L < WORTH_TRYING:
        return Backend("torch")
    width = case.O // case.segments
    model: Any = SimpleNamespace(
        W_enc_LXiDi=torch.empty(case.L, 1, case.I, device="meta"), n_latents=case.L, d_out=width,
        W_dec_LXoDo=torch.empty(case.L, case.segments, width, device="meta"),
        activation_fn=SimpleNamespace(current_k=case.k),
    )  # fmt: skip
    trial = Trial(model, case.B, clock)
    if case.scheme == "topk":
        return trial.screened_or_not()
    if case.scheme in ("l1", "jumprelu"):
        return Backend("torch", sparse_below=trial.sparse_below())
    return Backend("torch")


def forced(case: Case) -> dict[str, Backend]:
    """Every variant of the shape."""
    if case.scheme == "topk":
        return {"torch": Backend("torch"), "torch:screened": Backend("torch", ("screened",))}
    if case.scheme in ("l1", "jumprelu"):
        return {"dense": Backend("torch", sparse_below=0.0), "sparse": Backend("torch", sparse_below=1.0)}
    return {"torch": Backend("torch")}


def measure(case: Case, repeats: int, clock: Callable[[], float]) -> dict[str, Any]:
    backend = chosen(case, clock)
    x_BI, target_BO = batch(case)
    steps, seconds = {}, {name: [] for name in (*forced(case), "auto")}
    for name, one in (forced(case) | {"auto": backend}).items():
        params = make_params(case, x_BI)
        steps[name] = Step(case, OpSet(one), params, torch.optim.Adam(params.values(), 5e-5, fused=True))
    for repeat in range(repeats + WARM_UP):
        for name, step in steps.items():
            start = clock()
            step.run(x_BI, target_BO)
            if repeat >= WARM_UP:
                seconds[name].append(clock() - start)
    fastest = min(forced(case), key=lambda name: statistics.median(seconds[name]))
    pairs = zip(seconds["auto"], seconds[fastest], strict=True)
    times = {f"{name}_ms": 1e3 * statistics.median(found) for name, found in seconds.items()}
    said = {"chosen": str(backend), "sparse_below": backend.sparse_below, "fastest": fastest}
    return {**said, **times, "auto_over_fastest": statistics.median(one / other for one, other in pairs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for name in arguments.cases:
        rows.append({"case": name, **measure(CASES[name], arguments.repeats, CLOCKS[arguments.clock])})
        print(json.dumps(rows[-1]), flush=True)
    if arguments.out:
        run = {"threads": arguments.threads, "clock": arguments.clock, "repeats": arguments.repeats, **provenance()}
        arguments.out.write_text(json.dumps({"run": run, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
