"""Harvest speed on SmolLM2-135M: the plain model with a forward hook against TransformerBridge's run_with_cache.

Each way keeps one tensor. H harvest batch (sequences) · S sequence · M models · P hookpoints · D model dimension.

    python benches/data_harvest.py [rounds] [HOOKPOINT@HxS ...]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from data_common import interleaved, report, smollm2_path

from crosscode.data import ActivationHarvester, load_language_model

CASES = ("blocks.14.hook_resid_post@2x512", "blocks.14.hook_resid_post@2x2048", "blocks.2.hook_mlp_out@2x512")


def main(rounds: int, cases: Sequence[str]) -> None:
    path = str(smollm2_path())
    exact = load_language_model(path)
    rounded = load_language_model(path, dtype="bfloat16")
    rows = []
    for case in cases:
        name, _, shape = case.partition("@")
        H, S = map(int, shape.split("x"))
        tokens_HS = torch.randint(100, exact.vocab_size, (H, S), generator=torch.Generator().manual_seed(0))
        ways = ways_of(exact, rounded, name, tokens_HS)
        acts = {label: way()[..., 1:, :].float() for label, way in ways.items()}
        times = interleaved(ways, rounds)
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
                    "relative_error": float((acts[label] - reference_HSD).norm() / reference_HSD.norm()),
                }
            )
    report("data_harvest", rows, model="SmolLM2-135M-Instruct", rounds=rounds)


def ways_of(exact: Any, rounded: Any, name: str, tokens_HS: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """Every way returns `acts_HSD`."""
    bridged = ActivationHarvester([exact], [name], path="bridge")
    bridge = bridged._runs[0].bridge
    plain, plain_bf16 = ActivationHarvester([exact], [name]), ActivationHarvester([rounded], [name])

    def run_with_cache(**options: Any) -> torch.Tensor:
        with torch.no_grad():
            _, cache = bridge.run_with_cache(tokens_HS, names_filter=[name], **options)
        return cache[name]

    return {
        "run_with_cache": run_with_cache,
        "run_with_cache, stop_at_layer": lambda: run_with_cache(stop_at_layer=int(name.split(".")[1]) + 1),
        "crosscode float32": lambda: plain.harvest(tokens_HS)[:, :, 0, 0],
        "crosscode bfloat16": lambda: plain_bf16.harvest(tokens_HS)[:, :, 0, 0],
    }


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5, sys.argv[2:] or CASES)
