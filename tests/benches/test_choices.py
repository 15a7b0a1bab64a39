"""The bench of a run's choices, at toy sizes."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benches"))
    import choices

    monkeypatch.setattr(choices, "WORTH_TRYING", 0)
    yield choices
    for name in ("choices", "step_parts", "train_step"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("scheme", ["topk", "batch_topk", "l1", "jumprelu"])
def test_every_variant_is_timed_beside_the_chosen_one(bench, scheme):
    case = bench.Case(scheme, B=8, I=12, O=16, L=64, k=4, l0=8.0 if scheme in ("l1", "jumprelu") else 0.0)
    row = bench.measure(case, 2, time.perf_counter)
    assert row["fastest"] in bench.forced(case) and row["auto_over_fastest"] > 0
    assert {f"{name}_ms" for name in (*bench.forced(case), "auto")} <= row.keys()


def test_the_shapes_are_those_of_the_docs(bench):
    assert len(bench.CASES) == 8 and {case.scheme for case in bench.CASES.values()} == {
        "topk",
        "batch_topk",
        "l1",
        "jumprelu",
    }
