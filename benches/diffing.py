"""What every way of comparing two models finds of a change that is known (`crosscode.demo.plants`).

    python benches/diffing.py train [--plants statement] [--methods topk] [--seeds 0 1 2]    plants, stores, runs
    python benches/diffing.py score [same options]     rows of benches/results/diffing.json
    python benches/diffing.py table                    print the table of docs/diffing.md

Both go on where they were stopped: what is there already is left out, and nothing is made for it. Everything but the rows lies in
--work.

A latent is *true* where at least half of its summed activation on held-out text is at known positions: those that announce
the planted behaviour or belong to it. The ranking is that of the verdict (`crosscode.analysis.verdict`).

Letters: B tokens · M models · P hookpoints · D width.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffing_scores import TRUE_SHARE, Pair, score

import crosscode
from crosscode.analysis.latent_scaling import THRESHOLD
from crosscode.api.run import Run
from crosscode.build.experiment import Experiment, open_experiment
from crosscode.build.schema import check_config
from crosscode.commands.parts.options import merged
from crosscode.config.reading import read_yaml
from crosscode.demo.plants import PLANTS, Plant
from crosscode.files import write_json
from crosscode.models.activations.relu import ReLUActivation
from crosscode.models.base import BaseCrosscoder
from crosscode.models.sae_or_transcoder import SAEOrTranscoder
from crosscode.recipes import recipe_path

STORED = Path(__file__).parent / "results" / "diffing.json"
TRAIN_PLANT = Path(__file__).parent / "demo_models" / "train_plant.py"
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "l1": ("l1_crosscoder", {}),
    "topk": ("topk_crosscoder", {}),
    "batch_topk": ("batch_topk_crosscoder", {}),
    "feb_update": ("feb_update_diffing_topk", {}),
    "dfc": ("dedicated_feature_crosscoder", {}),
    "delta": ("delta_crosscoder", {}),
    "delta_4": ("delta_crosscoder", {"objective": {"delta": {"weight": 4.0}}}),
    "demo": ("demo", {}),
    "diff_sae": ("diff_sae", {}),
    "difference_lens": ("diff_sae", {}),
}
"""Recipe, and what is changed in it."""
N_TOKENS, N_HELDOUT = 200_000, 40_000


# ---- plants, stores, runs


def planted_model(plant: Plant, work: Path) -> str:
    """The fine-tuned model, trained if it is not there; the statement's comes with crosscode."""
    if plant == "statement":
        return "demo:planted"
    folder = work / plant
    if not (folder / "planted_card.json").is_file():
        command = [sys.executable, str(TRAIN_PLANT), "--plant", plant, "--out", str(folder)]
        subprocess.run(command, check=True)
    return str(folder / "planted")


def open_pair(plant: Plant, work: Path) -> Pair:
    """Its activations are harvested if they are not there."""
    models = [("base", "demo:base"), ("planted", planted_model(plant, work))]

    def experiment(split: str) -> Experiment:
        text = {"type": "demo", "domains": ["code"], "plant": plant}
        other = "train" if split == "heldout" else "heldout"
        values = {
            "language_models": [{"name": name, "path": path, "dtype": "float32"} for name, path in models],
            "data": {"source": {**text, "split": other}, "heldout": {**text, "split": split}},
        }
        opened = open_experiment(check_config(merged(recipe("topk"), values)), to_train=False)
        assert isinstance(opened, Experiment)
        return opened

    (work / plant).mkdir(parents=True, exist_ok=True)
    file = work / plant / "activations.npy"
    if not file.is_file():
        acts_BMPD = torch.cat(list(experiment("train").heldout_activations(N_TOKENS)))
        np.save(file.with_suffix(".part.npy"), acts_BMPD.numpy())
        file.with_suffix(".part.npy").replace(file)
    heldout = experiment("heldout")
    return Pair(plant, heldout, torch.from_numpy(np.load(file)), list(heldout.heldout_batches(N_HELDOUT)))


def recipe(method: str) -> dict[str, Any]:
    name, changes = METHODS[method]
    path = recipe_path(name)
    assert path is not None
    return merged(read_yaml(str(path)), changes)


def train(pair: Pair, method: str, seed: int, folder: Path) -> Run:
    """One run at the budget that all have, of the recipe as it is else."""
    if (folder / "summary.json").is_file():
        return crosscode.open(folder)
    config = recipe(method)
    return crosscode.train(
        pair.acts_BMPD,
        config["crosscoder"],
        names=pair.experiment.output_names(),  # of a crosscoder: all positions
        heldout=torch.cat([batch.usable() for batch in pair.heldout]),
        run_dir=folder,
        progress=False,
        overwrite=True,
        seed=seed,
        objective=config["objective"],
        constraints=config.get("constraints", {}),
        train={**config["train"], "n_tokens": N_TOKENS},
        evaluation={"n_tokens": 10_000},
    )


def difference_lens(pair: Pair, seed: int) -> BaseCrosscoder:
    """The mean difference of the models' activations on a third of the text, as an SAE with this one direction."""
    acts_BMPD = pair.acts_BMPD.chunk(3)[seed]
    mean_1D = torch.nn.functional.normalize((acts_BMPD[:, 1] - acts_BMPD[:, 0]).mean(0))
    width = mean_1D.shape[1]
    model = SAEOrTranscoder(width, width, 1, ReLUActivation(n_latents=1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.W_enc_LXiDi.copy_(mean_1D)
        model.W_dec_LXoDo.copy_(mean_1D)
    return model.eval()


# ---- rows


def stored() -> dict[str, Any]:
    """What was kept; rows that were ranked while the verdict asked for another bound of nu are as if they were not there."""
    results: dict[str, Any] = json.loads(STORED.read_text()) if STORED.exists() else {"rows": {}}
    results["rows"] = {name: row for name, row in results["rows"].items() if row.get("threshold") == THRESHOLD}
    return results


def keep(name: str, row: dict[str, Any]) -> None:
    results = stored()
    results |= {"n_tokens": N_TOKENS, "n_heldout": N_HELDOUT, "true_share": TRUE_SHARE, "cores": os.cpu_count()}
    results["rows"] = dict(sorted({**results["rows"], name: row | {"threshold": THRESHOLD}}.items()))
    write_json(STORED, results)


def table() -> str:
    """Markdown: for each plant, a row a method; ranks of each seed, else medians over seeds, ± half of the range."""
    rows = stored()["rows"]
    lines: list[str] = []
    for plant in PLANTS:
        lines += [
            f"\n**{plant}**\n",
            "| method | rank of the first true latent, by seed | false in the top 10 | AUROC first | AUROC top 10 "
            "| steering (random) | ablation (random) | FVU base, planted |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for method in METHODS:
            found = [row for name, row in rows.items() if name.rpartition("/")[0] == f"{plant}/{method}"]
            lines.append(f"| {method} | {' | '.join(_shown(found))} |" if found else f"| {method} | not run |||||||")
    return "\n".join(lines)


def _shown(rows: list[dict[str, Any]]) -> list[str]:
    def median(name: str) -> float:
        return statistics.median(row[name] for row in rows)

    def spread(name: str, form: str) -> str:
        half = (max(row[name] for row in rows) - min(row[name] for row in rows)) / 2
        return f"{median(name):{form}}" + (f" ±{half:{form.lstrip('+')}}" if len(rows) > 1 else "")

    fvu = [list(row["fvu_by_position"].values()) for row in rows if "fvu_by_position" in row]
    return [
        ", ".join(str(row["first_true_rank"] or "none") for row in rows),
        ", ".join(f"{row['false_among_top']} of {len(row['top'])}" for row in rows),
        spread("auroc_first", ".2f"),
        spread("auroc_top", ".2f"),
        f"{spread('steer', '+.1f')} ({median('steer_random'):+.1f})",
        f"{spread('ablate', '+.1f')} ({median('ablate_random'):+.1f})",
        ", ".join(f"{statistics.median(column):.3f}" for column in zip(*fvu, strict=True)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Known changes, and what each method finds of them.")
    parser.add_argument("what", choices=("train", "score", "table"))
    parser.add_argument("--plants", nargs="+", choices=PLANTS, default=list(PLANTS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("runs/diffing"), help="folder of plants, stores and runs")
    options = parser.parse_args()
    if options.what == "table":
        print(table())
        return
    for plant in options.plants:
        cells = [(method, seed) for method in options.methods for seed in options.seeds]
        if options.what == "score":
            cells = [cell for cell in cells if "{}/{}/{}".format(plant, *cell) not in stored()["rows"]]
        if not cells:
            continue
        pair = open_pair(plant, options.work)
        for method, seed in cells:
            name, start = f"{plant}/{method}/{seed}", time.monotonic()
            if method == "difference_lens":
                model, architecture, figures = difference_lens(pair, seed), "diff_sae", {}
            else:
                run = train(pair, method, seed, options.work / plant / f"{method}_{seed}")
                model, architecture, summary = run.model, run.config.crosscoder.type, run.summary
                figures = {figure: summary[figure] for figure in ("fvu_by_position", "l0", "dead_fraction")}
            if options.what == "score":
                keep(name, figures | score(pair, model, architecture))
            print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
