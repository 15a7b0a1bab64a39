"""All schemes of crosscoders at one L0: on a planted dictionary, on the demo pair, and how many latents die of 16,384.

    python benches/equal_l0.py run [{planted,demo,demo24,dead} ...] [--scheme NAME ...] [--seed 0 1 2]    train and store
    python benches/equal_l0.py table                                                               print what is stored

planted: `crosscode synthetic` as it ships, L0 8. demo: recipes as they ship, on 250k tokens, L0 32: `k` if there is one,
else the target of the term that draws L0 (a controller where that is a penalty). demo24: the same at L0 24. dead: 2,048 planted
features, 16,384 latents, L0 32 (L1 and tanh: what their penalty gives), 300 steps of 256 tokens, as the schemes are tuned for 320
latents, and with an lr and weights at the start for so many. What is stored is not trained again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import crosscode
from crosscode.config.reading import load_yaml
from crosscode.files import json_text, write_text
from crosscode.recipes import recipe_names, recipe_path
from crosscode.synthetic.config import PlantedConfig, SyntheticConfig
from crosscode.synthetic.runs import run_synthetic
from crosscode.synthetic.schemes import SCHEMES

STORED = Path(__file__).parent / "results" / "equal_l0.json"
N_TOKENS_OF_DEMO = 250_000
# Reconstruction alone brings JumpReLU with the thresholds of its recipes to 28.
L0_OF_DEMO = {"demo": 32, "demo24": 24}
TARGETS = {"l0": "target", "l1": "target_l0", "tanh": "target_l0"}
DEAD = {"n_latents": 16_384, "l0": 32, "n_steps": 300, "batch_size": 256, "n_heldout_tokens": 32_768}
# The lr falls with sqrt(L) (Gao et al. 2024); at this norm the k winners among L random directions reconstruct a token's length
# and more, so that they shrink and others get their turn. At 0.1 they grow, and leave the others behind. JumpReLU's decoder
# begins at 0.4 already, its encoder at 1/128 of that. The models' activations are nearly equal: tied latents, with one vector in
# both, read them sqrt(2) times as strongly as latents with two, which are that much longer to win as often.
OF_MANY_LATENTS = {"lr": 6e-4, "dec_init_norm": 0.6, "encoder_scale": 2.0, "own_scale": 2**0.5}
COLUMNS = {
    "l0": ("L0", "{:.1f}"), "fvu": ("FVU", "{:.3f}"), "loss_recovered": ("loss recovered", "{:.3f}"),
    "dead_fraction": ("dead", "{:.2%}"), "recovered": ("recovered", "{:.1%}"), "step_ms": ("ms a step", "{:.0f}"),
}  # fmt: skip


def synthetic(scheme: str, seed: int, n_features: int = 256, **fields: Any) -> dict[str, Any]:
    planted = PlantedConfig(seed=seed, n_features=n_features, mean_active=fields.get("l0", 8))
    (found,) = run_synthetic(SyntheticConfig(planted=planted, schemes=[scheme], seed=seed, **fields))
    figures = ("l0", "fvu", "dead_fraction", "step_ms")
    return {name: getattr(found, name) for name in figures} | {"recovered": found.ground_truth.all.recovered}


def demo(scheme: str, seed: int, l0: int) -> dict[str, Any]:
    recipe, changes = recipe_of(scheme), dict[str, Any](train={"n_tokens": N_TOKENS_OF_DEMO})
    if "k" in recipe["crosscoder"]["activation"]:
        changes["crosscoder"] = {"activation": {**recipe["crosscoder"]["activation"], "k": l0}}
        if recipe["crosscoder"]["activation"]["type"] == "groupmax":  # in as many groups of one size
            changes["crosscoder"]["n_latents"] = -(-recipe["crosscoder"]["n_latents"] // l0) * l0
    else:
        (term,) = recipe["objective"].keys() & TARGETS.keys()
        changes["objective"] = {term: {TARGETS[term]: l0}}
    with tempfile.TemporaryDirectory() as folder:
        run = crosscode.train(scheme, seed=seed, run_dir=folder, overwrite=True, **changes)
        summary = json.loads((Path(run.path) / "summary.json").read_text())
        rows = [json.loads(line) for line in (Path(run.path) / "metrics.jsonl").read_text().splitlines()]
    step_ms = statistics.median(row["time/step_ms"] for row in rows if "time/step_ms" in row)
    figures = {name: summary[name] for name in ("l0", "fvu", "dead_fraction")}
    loss_recovered = statistics.mean(summary["loss_recovered"].values())  # over the two models
    return figures | {"loss_recovered": loss_recovered, "step_ms": step_ms}


def recipe_of(name: str) -> dict[str, Any]:
    path = recipe_path(name)
    assert path is not None
    return load_yaml(path.read_text(), name)


def schemes_of_demo() -> list[str]:
    """Recipes of a crosscoder between two models at one hookpoint, of the pair that `l1_crosscoder` has."""
    pair, names = recipe_of("l1_crosscoder")["language_models"], []
    for name in recipe_names():
        recipe = recipe_of(name)
        if (
            not name.startswith("demo")
            and recipe["crosscoder"].get("type") == "model_hookpoint_acausal"
            and recipe["language_models"] == pair
        ):
            names.append(name)
    return names


def planned(data: str) -> dict[str, Any]:
    """By name of a row what trains it, given a seed."""
    if data in L0_OF_DEMO:
        return {name: lambda seed, name=name: demo(name, seed, L0_OF_DEMO[data]) for name in schemes_of_demo()}
    if data == "planted":
        return {name: lambda seed, name=name: synthetic(name, seed, l0=8, max_runs=3) for name in SCHEMES}
    return {
        name + said: lambda seed, name=name, fields=fields: synthetic(name, seed, n_features=2048, **DEAD, **fields)
        for said, fields in (("", OF_MANY_LATENTS), (", as for 320 latents", {}))
        for name in SCHEMES
    }


def stored() -> dict[str, Any]:
    return json.loads(STORED.read_text()) if STORED.exists() else {}


def run(data: list[str], schemes: list[str] | None, seeds: list[int]) -> None:
    for seed in seeds:
        for of in data:
            for name, train in planned(of).items():
                key = f"{of}; {name}; seed {seed}"
                if key in stored() or (schemes and name not in schemes):
                    continue
                found = {**train(seed), "load_average": os.getloadavg()[0]}
                write_text(STORED, json_text(dict(sorted({**stored(), key: found}.items())), indent=1) + "\n")
                print(f"{key}: {found}", file=sys.stderr, flush=True)


def table() -> Iterator[str]:
    """Markdown: a table a kind of data, a row a scheme; mean over the seeds, and where there are several half the spread
    between the largest and the smallest; of the times the least, to which other work only adds."""
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for key, found in stored().items():
        data, name, _ = key.split("; ")
        runs.setdefault(data, {}).setdefault(name, []).append(found)
    for data, by_name in runs.items():
        columns = [name for name in COLUMNS if any(name in found for rows in by_name.values() for found in rows)]
        yield f"\n{data}:\n\n| scheme | seeds | " + " | ".join(COLUMNS[name][0] for name in columns) + " |"
        yield "|---|---|" + "---|" * len(columns)
        for scheme, rows in by_name.items():
            by_column = {name: sorted(found[name] for found in rows if name in found) for name in columns}
            cells = [
                _cell(COLUMNS[name][1], values[:1] if name == "step_ms" else values)
                for name, values in by_column.items()
            ]
            yield f"| `{scheme}` | {len(rows)} | " + " | ".join(cells) + " |"


def _cell(form: str, values: list[float]) -> str:
    if not values:
        return "-"
    mean = form.format(statistics.mean(values))
    return mean if len(values) == 1 else f"{mean} ± {form.format((max(values) - min(values)) / 2)}"


def main() -> None:
    parser = argparse.ArgumentParser(description="All schemes of crosscoders at one L0.")
    commands = parser.add_subparsers(required=True, dest="command")
    runner = commands.add_parser("run", help="train and store the figures")
    runner.add_argument("data", nargs="*", metavar="DATA", help="planted, demo, demo24, dead; default: all")
    runner.add_argument("--scheme", nargs="+", metavar="NAME", help="rows; default: all")
    runner.add_argument("--seed", nargs="+", type=int, default=[0, 1, 2])
    commands.add_parser("table", help="print the stored figures as markdown")
    options = parser.parse_args()
    if options.command == "table":
        print("\n".join(table()))
    else:
        run(options.data or ["planted", *L0_OF_DEMO, "dead"], options.scheme, options.seed)


if __name__ == "__main__":
    main()
