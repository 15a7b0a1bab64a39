"""The scores of the bench on known changes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from crosscode.analysis.encoded import ActiveEntries, EncodedBatch
from crosscode.demo.plants import PlantedPositions

BENCHES = Path(__file__).parents[2] / "benches"


@pytest.fixture
def scores(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHES))
    import diffing_scores  # pyright: ignore[reportMissingImports]

    yield diffing_scores
    sys.modules.pop("diffing_scores", None)


def test_auroc_counts_pairs_with_ties_half(scores):
    rng = np.random.default_rng(0)
    score_B, known_B = rng.integers(0, 4, 60).astype(float), rng.random(60) < 0.3
    pairs = [(a > b) + 0.5 * (a == b) for a in score_B[known_B] for b in score_B[~known_B]]
    assert scores.auroc(score_B, known_B) == pytest.approx(np.mean(pairs))


def test_the_share_of_a_latent_at_known_positions_leaves_out_the_first_tokens(scores, monkeypatch):
    known = np.zeros(50, bool)
    known[[3, 45]] = True  # the first lies before what is scored
    found = PlantedPositions(known, np.zeros(50, bool))
    monkeypatch.setattr(scores, "planted_positions", lambda *_, **__: found)
    entries = scores.Entries(None, "statement")
    active = ActiveEntries(
        torch.tensor([3, 44, 45, 46]), torch.tensor([0, 1, 0, 0]), torch.tensor([9.0, 1.0, 3.0, 1.0]), 2
    )
    nothing = torch.zeros(50, 1, 1)
    entries.update(EncodedBatch(torch.zeros(1, 50, dtype=torch.long), 0, torch.arange(50), active, nothing, nothing))
    known_B, share_L, activation_B = entries.scores(2)
    assert known_B.sum() == 1 and len(known_B) == 50 - scores.UNSCORED
    assert share_L.tolist() == [0.75, 0.0]
    assert activation_B(0)[[5, 6]].tolist() == [3.0, 1.0]
