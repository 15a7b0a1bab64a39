"""Nested dictionaries on a planted hierarchy: do they absorb less, and what does a step cost?

    python benches/matryoshka.py absorption [SEED ...]    train SAEs with and without prefixes (default: seeds 0 1 2)
    python benches/matryoshka.py step                     time of a training step with five prefixes against none
    python benches/matryoshka.py table                    print what is stored

A child feature fires only where its parent does. A latent that stands for "parent and child" spares the SAE one latent, and the
parent's latent then stays silent there: it is absorbed (Chanin et al. 2024, arXiv:2409.14507). Counted on fresh tokens: on which
share of the tokens with a child the latent nearest to its parent is silent, and the same for tokens with the parent alone.

Axes: B tokens · F features · D width · L latents.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crosscode.config.registry import Component
from crosscode.files import json_text, write_text
from crosscode.models import AnthropicTransposeInit, BatchTopkActivation, SAEOrTranscoder, TopkActivation
from crosscode.objectives import LossContext, objective_from
from crosscode.trainers.firing import FiringTracker

STORED = Path(__file__).parent / "results" / "matryoshka.json"
N_PARENTS, N_CHILDREN, D, L, K, BATCH, N_STEPS = 16, 4, 64, 96, 4, 256, 1500
PREFIXES = (16, 32, 64)


class Hierarchy:
    """`N_PARENTS` features, each with children that fire on a fifth of its tokens; amplitudes in [0.5, 1.5]."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        self.directions_FD = torch.nn.functional.normalize(torch.randn(80, D, generator=self.generator), dim=1)

    def sample(self, n_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Activations of norm about sqrt(D), which parents fire, and which children, by parent."""
        draw = lambda *shape: torch.rand(n_tokens, *shape, generator=self.generator)  # noqa: E731
        parent_BF = draw(N_PARENTS) < 0.15
        child_BFC = (draw(N_PARENTS, N_CHILDREN) < 0.2) & parent_BF[:, :, None]
        active_BF = torch.cat([parent_BF, child_BFC.flatten(1)], 1) * (0.5 + draw(5 * N_PARENTS))
        return active_BF @ self.directions_FD * D**0.5 / 2, parent_BF, child_BFC


def train(model: SAEOrTranscoder, terms: dict[str, dict[str, Any]], batches: Any, n_steps: int) -> list[float]:
    """Adam on batches; the seconds of each step."""
    objective = objective_from({name: Component(type=name, **fields) for name, fields in terms.items()})
    optimizer, firing = torch.optim.Adam(model.parameters(), lr=3e-3, fused=True), FiringTracker(model.n_latents)
    seconds = []
    for step in range(n_steps):
        x_BD = next(batches)
        started = time.perf_counter()
        result = model.forward_train(x_BD)
        firing.update(result.latents)
        context = LossContext(model, x_BD, x_BD, result, firing.tokens_since_fired_L, dead_after_tokens=20_000)
        objective(context, step, n_steps).total.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.after_step(result.latents)
        seconds.append(time.perf_counter() - started)
    return seconds


@torch.no_grad()
def absorption(seed: int, prefixes: tuple[int, ...]) -> dict[str, float]:
    torch.manual_seed(seed)
    planted = Hierarchy(seed)
    model = SAEOrTranscoder(D, D, L, BatchTopkActivation(K, L, threshold_ema_decay=0.99), prefixes=prefixes)
    model.init_weights(AnthropicTransposeInit(), seed)
    terms: dict[str, Any] = {"recon": {}, "auxk": {"k_aux": 16}} | ({"matryoshka": {}} if prefixes else {})
    with torch.enable_grad():
        train(model, terms, (planted.sample(BATCH)[0] for _ in iter(int, 1)), N_STEPS)
    model.eval()
    x_BD, parent_BF, child_BFC = planted.sample(8192)
    latents_BL = model.encode(x_BD)
    cosine_FL = planted.directions_FD[:N_PARENTS] @ torch.nn.functional.normalize(model.W_dec_LD, dim=1).T
    nearest = cosine_FL.max(1)
    silent_BF = latents_BL[:, nearest.indices] <= 0
    with_child_BF = child_BFC.any(2)
    return {
        "silent_with_child": float(silent_BF[with_child_BF].double().mean()),
        "silent_without": float(silent_BF[parent_BF & ~with_child_BF].double().mean()),
        "parent_cosine": float(nearest.values.mean()),
        "fvu": float((model(x_BD) - x_BD).square().sum() / (x_BD - x_BD.mean(0)).square().sum()),
        "l0": float((latents_BL > 0).sum(1).double().mean()),
        "dead_fraction": float((latents_BL > 0).any(0).logical_not().double().mean()),
    }


def step_seconds() -> dict[str, float]:
    """Medians of steps that alternate, TopK, B = 1024, D = 768, L = 8192, k = 32."""
    x_BD, sizes = torch.randn(1024, 768), (256, 512, 1024, 2048, 4096)
    ratios, plain, nested = [], [], []
    models = [SAEOrTranscoder(768, 768, 8192, TopkActivation(32, 8192), prefixes=p) for p in ((), sizes)]
    for model in models:
        model.init_weights(AnthropicTransposeInit())
    for _ in range(7):
        plain += train(models[0], {"recon": {}}, iter([x_BD]), 1)
        nested += train(models[1], {"recon": {}, "matryoshka": {}}, iter([x_BD]), 1)
        ratios.append(nested[-1] / plain[-1])
    return {
        "none_s": statistics.median(plain[1:]),
        "five_prefixes_s": statistics.median(nested[1:]),
        "ratio": statistics.median(ratios[1:]),
        "load_average": os.getloadavg()[0],
    }


def store(name: str, found: dict[str, Any]) -> None:
    stored = json.loads(STORED.read_text()) if STORED.exists() else {}
    stored[name] = found
    write_text(STORED, json_text(dict(sorted(stored.items())), indent=1) + "\n")
    print(f"{name}: {found}", file=sys.stderr, flush=True)


def table() -> str:
    """Markdown: one row a run."""
    rows = [
        "| run | silent with child | silent without | parent cosine | FVU | L0 | dead |",
        "|---|---|---|---|---|---|---|",
    ]
    keys = ("silent_with_child", "silent_without", "parent_cosine", "fvu", "l0", "dead_fraction")
    for name, found in json.loads(STORED.read_text()).items():
        if name != "step":
            rows.append(f"| {name} | " + " | ".join(f"{found[key]:.3f}" for key in keys) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Nested dictionaries: absorption, and time of a step.")
    commands = parser.add_subparsers(required=True, dest="command")
    runner = commands.add_parser("absorption", help="train and store the figures")
    runner.add_argument("seeds", nargs="*", type=int, default=[0, 1, 2], metavar="SEED")
    commands.add_parser("step", help="time a step and store it")
    commands.add_parser("table", help="print the stored figures as markdown")
    options = parser.parse_args()
    if options.command == "table":
        print(table())
    elif options.command == "step":
        store("step", step_seconds())
    else:
        for seed in options.seeds:
            for name, prefixes in (("without", ()), ("matryoshka", PREFIXES)):
                store(f"{name}, seed {seed}", absorption(seed, prefixes))


if __name__ == "__main__":
    main()
