"""Harvest speed on SmolLM2-135M: the plain model with a forward hook against TransformerBridge's run_with_cache.

Each way keeps one tensor. The bare matrix products and attention kernels of the float32 run, on the tensors that it gives
them and with nothing in between, are what no float32 way on these kernels can go below.
H harvest batch (sequences) · S sequence · M models · P hookpoints · D model dimension.

    python benches/data_harvest.py [rounds] [HOOKPOINT@HxS ...]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from data_common import interleaved, report, smollm2_path
from torch.utils._python_dispatch import TorchDispatchMode

from crosscode.data import ActivationHarvester, load_language_model

CASES = ("blocks.14.hook_resid_post@2x512", "blocks.14.hook_resid_post@1x2048", "blocks.2.hook_mlp_out@2x512")


def main(rounds: int, cases: Sequence[str]) -> None:
    path = str(smollm2_path())
    exact = load_language_model(path, dtype="float32")
    rounded = load_language_model(path, dtype="bfloat16")
    rows = []
    for case in cases:
        name, _, shape = case.partition("@")
        H, S = map(int, shape.split("x"))
        tokens_HS = torch.randint(100, exact.vocab_size, (H, S), generator=torch.Generator().manual_seed(0))
        ways = ways_of(exact, rounded, name, tokens_HS)
        acts = {label: way()[..., 1:, :].float() for label, way in ways.items()}
        products, both = bare_kernels(ActivationHarvester([exact], [name]), tokens_HS)
        bare = {"bare products, float32": products, "bare products and attention, float32": both}
        times = interleaved({**ways, **bare}, rounds)
        reference_HSD, baseline = acts["run_with_cache, stop_at_layer"], times["run_with_cache, stop_at_layer"]
        for label, time in times.items():
            rows.append(
                {
                    "hookpoint": name,
                    "sequences": f"{H} x {S}",
                    "way": label,
                    "seconds": time.wall,
                    "cpu_seconds": time.cpu,
                    "tokens_per_s": H * S / time.wall,
                    "speed_vs_stop_at_layer": baseline.wall / time.wall,
                    "the_same_in_cpu_time": baseline.cpu / time.cpu,
                }
            )
            if label in acts:
                error = (acts[label] - reference_HSD).norm() / reference_HSD.norm()
                rows[-1]["relative_error"] = float(error)
    report("data_harvest", rows, model="SmolLM2-135M-Instruct", rounds=rounds)


def ways_of(exact: Any, rounded: Any, name: str, tokens_HS: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """Every way returns `acts_HSD`."""
    bridged = ActivationHarvester([exact], [name], path="bridge")
    bridge = bridged.bridge(0)
    plain, plain_bf16 = ActivationHarvester([exact], [name]), ActivationHarvester([rounded], [name])

    def run_with_cache() -> torch.Tensor:
        with torch.no_grad():
            _, cache = bridge.run_with_cache(tokens_HS, names_filter=[name], stop_at_layer=int(name.split(".")[1]) + 1)
        return cache[name]

    return {
        "run_with_cache, stop_at_layer": run_with_cache,
        "crosscode float32": lambda: plain.harvest(tokens_HS)[:, :, 0, 0],
        "crosscode bfloat16": lambda: plain_bf16.harvest(tokens_HS)[:, :, 0, 0],
    }


class _Calls(TorchDispatchMode):
    """The matrix products and attention calls of a run, with their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[Callable[[], Any]] = []
        self.attention: list[Callable[[], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = partial(func, *args, **(kwargs or {}))
        if func._schema.name in ("aten::mm", "aten::addmm", "aten::bmm"):
            self.products.append(call)
        elif "scaled_dot_product" in func._schema.name:
            self.attention.append(call)
        return call()


def bare_kernels(harvester: ActivationHarvester, tokens_HS: torch.Tensor) -> tuple[Callable[[], None], ...]:
    """The products of one harvest, and its products and attention calls, to be run again one after another."""
    with _Calls() as calls:
        harvester.harvest(tokens_HS)
    if not calls.products or not calls.attention:
        raise SystemExit("the model calls no matrix product or no attention kernel that this benchmark knows")

    def run(recorded: list[Callable[[], Any]]) -> None:
        for call in recorded:
            call()

    return partial(run, calls.products), partial(run, calls.products + calls.attention)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5, sys.argv[2:] or CASES)
