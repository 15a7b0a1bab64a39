"""The bench of all schemes at one L0."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

BENCHES = Path(__file__).parents[2] / "benches"


@pytest.fixture
def equal_l0(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHES))
    import equal_l0  # pyright: ignore[reportMissingImports]

    monkeypatch.setattr(equal_l0, "STORED", tmp_path / "stored.json")
    yield equal_l0
    sys.modules.pop("equal_l0", None)


def test_every_scheme_of_the_demo_pair_is_told_its_l0(equal_l0, monkeypatch):
    told = {}
    monkeypatch.setattr(equal_l0.crosscode, "train", lambda name, **given: told.update({name: given}) or 1 / 0)
    names = equal_l0.schemes_of_demo()
    for name in names:
        with pytest.raises(ZeroDivisionError):
            equal_l0.demo(name, 3, 24)
    assert told["topk_crosscoder"]["crosscoder"]["activation"]["k"] == 24 and told["topk_crosscoder"]["seed"] == 3
    assert told["groupmax_crosscoder"]["crosscoder"]["n_latents"] == 43 * 24  # k groups of one size
    assert told["l1_crosscoder"]["objective"] == {"l1": {"target_l0": 24}}
    assert told["wanted_l0_crosscoder"]["objective"] == {"l0": {"target": 24}}
    assert len(told) >= 9 and "matryoshka_crosscoder" in names and "sae_topk" not in names


def test_a_row_of_the_demo_has_the_loss_recovered_of_both_models(equal_l0, monkeypatch):
    def train(name, *, run_dir, **given):
        summary = {"l0": 32.0, "fvu": 0.1, "dead_fraction": 0.0, "loss_recovered": {"base": 0.9, "tuned": 0.8}}
        (Path(run_dir) / "summary.json").write_text(json.dumps(summary))
        rows = [{"time/step_ms": 3.0}, {"time/step_ms": 9.0}, {"time/step_ms": 4.0}, {"eval/fvu": 0.1}]
        (Path(run_dir) / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return SimpleNamespace(path=run_dir)

    monkeypatch.setattr(equal_l0.crosscode, "train", train)
    found = equal_l0.demo("l1_crosscoder", 0, 32)
    assert found == {
        "l0": 32.0,
        "fvu": 0.1,
        "dead_fraction": 0.0,
        "loss_recovered": pytest.approx(0.85),
        "step_ms": 4.0,
    }


def test_rows_are_stored_once_and_shown_with_their_spread(equal_l0, monkeypatch):
    trained = []

    def train(name):
        return lambda seed: trained.append((name, seed)) or {"l0": 8.0 + seed, "fvu": 0.125, "dead_fraction": 0.25}

    monkeypatch.setattr(equal_l0, "planned", lambda data: {name: train(name) for name in ("a", "b")})
    equal_l0.run(["planted"], None, [0, 2])
    equal_l0.run(["planted"], ["a"], [0, 1, 2])
    assert trained == [("a", 0), ("b", 0), ("a", 2), ("b", 2), ("a", 1)]
    assert list(equal_l0.table())[-2:] == [
        "| `a` | 3 | 9.0 ± 1.0 | 0.125 ± 0.000 | 25.00% ± 0.00% |",
        "| `b` | 2 | 9.0 ± 1.0 | 0.125 ± 0.000 | 25.00% ± 0.00% |",
    ]
