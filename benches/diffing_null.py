"""How often the verdict calls a latent specific where nothing tells two models apart: the null of its thresholds.

    python benches/diffing_null.py run [--pairs continued] [--methods demo] [--seeds 0]    rows of results/diffing_null.json
    python benches/diffing_null.py table                                                   print the table of docs/diffing.md

Goes on where it was stopped. Pairs, all of the embedded base:

- `continued`: trained on, on the text as it is (60,000 tokens, learning rates of the plants), in two orders of that text, which
  are others for each seed;
- `noise`: as it is, and each weight times 1 + 0.02 g with a standard normal g, another one for each seed;
- `bfloat16`: in float32 and in bfloat16;
- `itself`: twice the same.

Letters: B tokens · M models · P hookpoints · D width · L latents.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import crosscode
from crosscode.analysis.latent_scaling import RETURNED, THRESHOLD
from crosscode.analysis.latents_pass import study_latents
from crosscode.analysis.verdict import LEAN, MIN_FIRINGS, Verdict
from crosscode.build.experiment import Experiment, open_experiment
from crosscode.build.heldout import HeldoutBatch
from crosscode.build.schema import check_config
from crosscode.commands.parts.options import merged
from crosscode.config.reading import read_yaml
from crosscode.demo import demo_model_path
from crosscode.files import write_json
from crosscode.models.architecture import split_for
from crosscode.recipes import recipe_names

STORED = Path(__file__).parent / "results" / "diffing_null.json"
TRAIN_PLANT = Path(__file__).parent / "demo_models" / "train_plant.py"
PAIRS = ("continued", "noise", "bfloat16", "itself")
N_TOKENS, N_HELDOUT = 100_000, 40_000
NOISE = 0.02
SPLIT = split_for("model_hookpoint_acausal")
BOUNDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def schemes() -> list[str]:
    """Recipes of crosscoders between two models."""
    found = {name: read_yaml(name) for name in recipe_names()}
    return [
        name
        for name, values in found.items()
        if values["crosscoder"]["type"] == "model_hookpoint_acausal" and len(values["language_models"]) == 2
    ]


# ---- pairs


def language_models(pair: str, seed: int, work: Path) -> list[dict[str, Any]]:
    """The two of a pair, trained or written if they are not there."""
    if pair == "continued":
        orders = (2 * seed, 2 * seed + 1)
        for order in orders:
            if not (work / f"{pair}_{order}" / "planted_card.json").is_file():
                command = [sys.executable, str(TRAIN_PLANT), "--plant", "none", "--seed", str(order)]
                command += ["--tokens", "60000", "--batch-tokens", "1024", "--processes", "1"]
                subprocess.run([*command, "--out", str(work / f"{pair}_{order}")], check=True)
        paths = [str(work / f"{pair}_{order}" / "planted") for order in orders]
    else:
        paths = ["demo:base", str(noisy(work / f"{pair}_{seed}", seed)) if pair == "noise" else "demo:base"]
    dtypes = ["float32", "bfloat16" if pair == "bfloat16" else "float32"]
    return [{"name": name, "path": path, "dtype": dtype} for name, path, dtype in zip("ab", paths, dtypes, strict=True)]


@torch.no_grad()
def noisy(folder: Path, seed: int) -> Path:
    """The base with noise on its weights."""
    start, generator = demo_model_path("base"), torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    for weight in model.parameters():
        weight *= 1 + NOISE * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(start).save_pretrained(folder)
    return folder


def open_pair(models: list[dict[str, Any]], split: str) -> Experiment:
    """It looks at the text of one split as its held-out text."""
    text = {"type": "demo", "domains": ["code"]}
    data = {
        "source": {**text, "split": "train" if split == "heldout" else "heldout"},
        "heldout": {**text, "split": split},
        "equal_models": "train",
    }
    config = check_config(merged(read_yaml("topk_crosscoder"), {"language_models": models, "data": data}))
    opened = open_experiment(config, to_train=False)
    assert isinstance(opened, Experiment)
    return opened


# ---- rows


def verdict_of(
    acts_BMPD: Tensor, heldout: list[HeldoutBatch], names: list[str], method: str, seed: int, folder: Path
) -> Verdict:
    """That on a run of a recipe at the budget that all have, trained if it is not there."""
    config = read_yaml(method)
    there = (folder / "summary.json").is_file()
    run = (
        crosscode.open(folder)
        if there
        else crosscode.train(
            acts_BMPD,
            config["crosscoder"],
            names=names,
            heldout=acts_BMPD[:1000],
            progress=False,
            overwrite=True,
            objective=config["objective"],
            constraints=config.get("constraints", {}),
            train={**config["train"], "n_tokens": N_TOKENS},
            evaluation={"n_tokens": 1000},
            data={"equal_models": "train"},
            run_dir=folder,
            seed=seed,
        )
    )
    (verdict,) = study_latents(run.model, heldout, SPLIT, names).verdicts
    return verdict


def row(verdict: Verdict) -> dict[str, Any]:
    """What is called specific, and what would be at other bounds of all three nu if certainty were not asked for."""
    (table,) = verdict.tables
    assert table.scaling is not None
    enough_L = table.firings >= MIN_FIRINGS
    nu_L = torch.stack([share.nu_L for share in table.scaling.shares.values()]).amax(0)
    lean_L = torch.maximum(table.relative_norm, 1 - table.relative_norm)
    returned_L = table.scaling.returned.nu_L
    below = {
        str(bound): int((enough_L & (nu_L < bound) & ((lean_L >= LEAN) | (returned_L > RETURNED))).sum())
        for bound in BOUNDS
    }
    judged_L = nu_L[enough_L & nu_L.isfinite()]
    return {
        "n_judged": int(enough_L.sum()),
        "n_specific": verdict.counts["A-specific"] + verdict.counts["B-specific"],
        "n_undecided": verdict.counts["undecided"] - int((~enough_L).sum()),
        "difference": verdict.difference,
        "below": below,
        "lowest_nu": float(judged_L.min()),
        "nu_of_1_percent": float(judged_L.quantile(0.01)),
        "headline": verdict.headline(),
    }


def stored() -> dict[str, Any]:
    return json.loads(STORED.read_text()) if STORED.exists() else {"rows": {}}


def keep(name: str, found: dict[str, Any]) -> None:
    results: dict[str, Any] = {**stored(), "n_tokens": N_TOKENS, "n_heldout": N_HELDOUT}
    results["rows"] = dict(sorted({**results["rows"], name: found | {"threshold": THRESHOLD}}.items()))
    write_json(STORED, results)


def table() -> str:
    """Markdown: a row a pair, over all schemes and seeds."""
    rows = stored()["rows"]
    lines = [
        "| pair | runs | activations differ by | latents judged | specific | lowest ν | "
        + " | ".join(f"ν < {bound}" for bound in BOUNDS if bound >= 0.5)
        + " |",
        "|---" * (6 + sum(bound >= 0.5 for bound in BOUNDS)) + "|",
    ]
    for pair in PAIRS:
        some = [found for name, found in rows.items() if name.startswith(f"{pair}/")]
        if not some:
            lines.append(f"| {pair} | not run |")
            continue
        n_judged = sum(found["n_judged"] for found in some)
        cells = [
            pair,
            f"{len(some)}",
            f"{100 * sum(found['difference'] for found in some) / len(some):.2g} %",
            f"{n_judged:,}",
            f"{sum(found['n_specific'] for found in some)}",
            f"{min(found['lowest_nu'] for found in some):.2f}",
        ]
        for bound in BOUNDS:
            if bound >= 0.5:
                n = sum(found["below"][str(bound)] for found in some)
                cells.append(f"{n} ({100 * n / n_judged:.2g} %)" if n else "0")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Pairs that nothing tells apart, and what the verdict says of them.")
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--methods", nargs="+", choices=schemes(), default=schemes())
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--work", type=Path, default=Path("runs/diffing_null"), help="folder of models and runs")
    options = parser.parse_args()
    if options.what == "table":
        print(table())
        return
    for pair, seed in product(options.pairs, options.seeds):
        todo = [method for method in options.methods if f"{pair}/{method}/{seed}" not in stored()["rows"]]
        if not todo:
            continue
        models = language_models(pair, seed, options.work)
        acts_BMPD = torch.cat(list(open_pair(models, "train").heldout_activations(N_TOKENS)))
        heldout = open_pair(models, "heldout")
        batches, names = list(heldout.heldout_batches(N_HELDOUT)), heldout.output_names()
        for method in todo:
            name, start = f"{pair}/{method}/{seed}", time.monotonic()
            folder = options.work / name
            keep(name, row(verdict_of(acts_BMPD, batches, names, method, seed, folder)))
            print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
