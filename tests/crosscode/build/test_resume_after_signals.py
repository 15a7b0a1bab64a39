"""A real process, stopped by a real signal at several points, goes on as if nothing had happened: to the bit."""

import json
import subprocess
import sys
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

SCHEMES = {
    "topk": {
        "activation": {"type": "topk", "k": 4},
        "objective": {"recon": {}, "auxk": {"k_aux": 8, "dead_after_tokens": 128}},
    },
    "batch_topk": {
        "activation": {"type": "batch_topk", "k": 4, "threshold_ema_decay": 0.9},
        "objective": {"recon": {}, "auxk": {"k_aux": 8, "dead_after_tokens": 128}},
    },
    "jumprelu": {
        "activation": {"type": "jumprelu", "log_threshold_init": -1.0},
        "objective": {"recon": {}, "tanh": {"weight": 0.1}, "pre_act": {}},
    },
}
# Where the run is struck: (signal, step, place). Checkpoints are written every 3 steps of 10.
STRIKES = [
    ("SIGTERM", 1, "step"),
    ("SIGTERM", 6, "update"),
    ("SIGKILL", 2, "step"),  # before the first checkpoint
    ("SIGKILL", 5, "row"),
    ("SIGKILL", 6, "checkpoint"),
    ("SIGKILL", 8, "update"),
    ("SIGTERM", 8, "evaluation"),
    ("SIGKILL", 8, "evaluation"),
    ("SIGTERM", 9, "checkpoint"),
    ("SIGTERM", 10, "harvest"),
    ("SIGTERM", 9, "harvested"),
    ("SIGKILL", 10, "evaluation"),  # the trained model is saved already
]
STORED_STRIKES = [
    ("SIGTERM", 6, "update"),
    ("SIGTERM", 14, "harvest"),
    ("SIGTERM", 13, "harvested"),
    ("SIGKILL", 5, "row"),
    ("SIGKILL", 8, "update"),
]
EXIT_INTERRUPTED = 75


def later_rows(run: Path):
    """All that the metrics say, apart from times and sizes of the process."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    noise = ("time/", "memory/", "tokens_per_s", "elapsed_s")
    return [{name: value for name, value in row.items() if not name.startswith(noise)} for row in rows]


def assert_equal_models(folder: Path, expected: Path):
    ours, theirs = load_file(folder / "model.safetensors"), load_file(expected / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), (folder, name)


def scheme_config(scheme, lms, corpus):
    return {
        "backend": "torch",
        "device": "cpu",
        "language_models": [{"path": path} for path in lms],
        "hookpoints": ["blocks.1.hook_resid_post"],
        "data": {
            "source": {"type": "local", "path": corpus},
            "validation_fraction": 0.2,
            "sequence_length": 16,
            "harvest_batch_size": 4,
            "shuffle_buffer_size": 128,
            "n_tokens_for_norm_estimate": 128,
        },
        "crosscoder": {"n_latents": 32, "init": {"type": "anthropic_transpose"}, "activation": scheme["activation"]},
        "objective": scheme["objective"],
        "train": {
            "n_tokens": 640,
            "batch_size": 64,
            "optimizer": {"type": "adam", "lr": 0.01},
            "dead_after_tokens": 128,
            "log_every": 1,
            "checkpoint_every": 3,
            "histogram_every": 4,
        },
        "evaluation": {"n_tokens": 60, "every": 4, "loss_recovered": "never"},
    }


@dataclass(frozen=True)
class Struck:
    """A run without interruption, and the same run interrupted and resumed, with both exit codes."""

    whole: Path
    run: Path
    exit_struck: int
    exit_resumed: int


def struck_runs(cases, lms, corpus, root):
    """Each case with its runs; each run is a process, all are forked from one."""
    scenarios, places = [], []
    for name, stored in dict.fromkeys((name, stored) for name, stored, _ in cases):
        folder = root / f"{name}-{'stored' if stored else 'harvested'}"
        folder.mkdir()
        scenarios.append(_scenario(folder / "whole", scheme_config(SCHEMES[name], lms, corpus), stored))
        for i, strike in enumerate(strike for each, kept, strike in cases if (each, kept) == (name, stored)):
            run = folder / f"run{i}"
            signal, step, place = strike
            first = _scenario(run, scheme_config(SCHEMES[name], lms, corpus), stored)
            places.append(((name, stored, strike), folder / "whole", run, len(scenarios)))
            scenarios += [first | {"signal": signal, "step": step, "place": place}, first | {"resume": str(run)}]
    exits = _run_scenarios(scenarios, root)
    return {key: Struck(whole, run, exits[i], exits[i + 1]) for key, whole, run, i in places}


def _scenario(run: Path, config, stored):
    if stored:  # ten batches are more than one epoch: the last ones come back from the store
        config["data"] |= {"cache": {"path": f"{run}-store", "shard_mb": 1}, "prefetch": 2, "shuffle_buffer_size": 512}
        config["train"] |= {"n_tokens": 2560, "batch_size": 256}
    file = run.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config | {"run_dir": str(run)}))
    return {"config": str(file)}


def _run_scenarios(scenarios, folder: Path):
    n_stopped = sum(scenario.get("signal") == "SIGTERM" for scenario in scenarios)
    (folder / "scenarios.json").write_text(json.dumps(scenarios))
    script = Path(__file__).with_name("interrupted_runs.py")
    done = subprocess.run(
        [sys.executable, str(script), str(folder / "scenarios.json"), str(folder / "results.json")],
        capture_output=True,
        text=True,
        cwd="/",
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("continue with: crosscode train --resume") == n_stopped, done.stderr
    return json.loads((folder / "results.json").read_text())


CASES = [(name, False, strike) for name in SCHEMES for strike in STRIKES]
CASES += [(name, True, strike) for name in SCHEMES for strike in STORED_STRIKES]
SOME = [(name, False, strike) for name, strike in zip(cycle(SCHEMES), STRIKES, strict=False)]
SOME += [(name, True, strike) for name, strike in zip(cycle(SCHEMES), STORED_STRIKES, strict=False)]
OTHERS = [case for case in CASES if case not in SOME]


@pytest.mark.parametrize(
    "cases", [pytest.param(SOME, id="each strike"), pytest.param(OTHERS, id="others", marks=pytest.mark.soak)]
)
def test_an_interrupted_run_ends_like_one_that_was_not(cases, tiny_lms, tiny_corpus, tmp_path):
    found = struck_runs(cases, tiny_lms, tiny_corpus, tmp_path)
    assert len(found) == len(cases)
    for (name, stored, strike), case in found.items():
        what = (name, stored, *strike)
        assert case.exit_struck == (EXIT_INTERRUPTED if strike[0] == "SIGTERM" else -9), what
        assert case.exit_resumed == 0, what
        run, whole = case.run, case.whole
        assert later_rows(run) == later_rows(whole), what
        assert (run / "histograms.jsonl").read_text() == (whole / "histograms.jsonl").read_text(), what
        assert_equal_models(run / "final", whole / "final")
        assert_equal_models(run / "checkpoints/step_10", whole / "checkpoints/step_10")
        state = "checkpoints/step_10/trainer_state.safetensors"
        ours, theirs = load_file(run / state), load_file(whole / state)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), what
        assert not [path for path in run.rglob(".*") if path.name.startswith((".step", ".final"))], what
