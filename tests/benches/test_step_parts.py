"""The bench of a step against its unavoidable parts, at toy sizes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

BENCHES = Path(__file__).parents[2] / "benches"


@pytest.fixture
def step_parts(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHES))
    import step_parts  # pyright: ignore[reportMissingImports]

    yield step_parts
    for name in ("step_parts", "train_step"):
        sys.modules.pop(name, None)


def test_every_kind_of_step_is_compared_and_the_rest_explained(step_parts):
    case = step_parts.Case("topk", B=8, I=12, O=16, L=64, k=4)
    ticks = iter(range(10**6))  # a clock by which every part takes one second
    rows = step_parts.measure(case, 2, lambda: float(next(ticks)))
    assert [row["variant"] for row in rows] == ["plain", "AuxK", "AuxK, 5 % dead", "row-sparse"]
    plain, auxk, _, row_sparse = rows
    # encode, decode and loss, backward, clip, optimizer; three unavoidable parts, one where only the encode counts.
    assert plain["ratio"] == pytest.approx(5 / 3) and row_sparse["ratio"] == pytest.approx(5)
    assert plain["rest"] == pytest.approx(
        {"decode and loss": 1 / 3, "backward": 1 / 3, "encode": 0, "clip": 0, "optimizer": 0}
    )
    assert auxk["ratio"] == pytest.approx(7 / 3) and "AuxK forward" in auxk["rest"]
    assert (plain["parts_ms"], plain["step_ms"]) == (3000, 5000)


def test_auxk_is_what_moves_dead_latents(step_parts):
    import torch

    x_BI, target_BO = (torch.randn(8, n, generator=torch.Generator().manual_seed(n)) for n in (12, 16))
    moved = []
    for k_aux in (0, 6):
        case = step_parts.Case("topk", B=8, I=12, O=16, L=64, k=4, k_aux=k_aux, dead=0.1)
        step = step_parts.make_step(case, "torch", x_BI)
        with torch.no_grad():
            step.params["b_enc_L"][:7] = -1.0  # positive on some tokens, among the 4 largest on hardly any
        before_LO = step.params["W_dec_LO"].detach().clone()
        step.run(x_BI, target_BO)
        moved.append(int((step.params["W_dec_LO"][:7] != before_LO[:7]).any(1).sum()))
    assert moved[0] < moved[1]
